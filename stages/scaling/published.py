"""What DeepSeek LLM (2401.02954) publishes of its scaling laws, and what can be checked against it.

Published: the formulas of section 3 with their coefficients, the settings of the two models, the exponents of table 4.
Not published: the runs behind them. `settings` holds the formulas against the settings of the two models;
`synthetic_ladder` draws points *from the formulas*, with a loss level, curvature and noise of our own choosing, so that
the fits can be tried on a truth that is known. Those points are no data of the paper's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from model.presets import preset
from stages.scaling.isoflop import IsoFlop
from stages.scaling.laws import PowerLaw, SaturatingLaw

RATE = PowerLaw(0.3118, -0.1250)  # η_opt, section 3.1
BATCH = PowerLaw(0.2920, 0.3271)  # B_opt in tokens, section 3.1
SCALE = PowerLaw(0.1715, 0.5243)  # M_opt, section 3.2
TOKENS = PowerLaw(5.8316, 0.4757)  # D_opt, section 3.2
# Exponents of (M_opt, D_opt) by training data, table 4.
BY_DATA = {"early data": (0.450, 0.550), "current data": (0.524, 0.476), "OpenWebText2": (0.578, 0.422)}

# Of our own making, for synthetic points alone: the loss at the optimum, and what a scale e times off it costs.
_LOSS, _CURVATURE = SaturatingLaw(0.55, 25.0, 0.085), 0.015


@dataclass(frozen=True)
class Setting:
    """A published model's peak rate and batch (tokens) beside what the formulas give for its compute C = M·D."""

    name: str
    compute: float
    rate: float
    rate_by_formula: float
    batch: float
    batch_by_formula: float


def settings() -> list[Setting]:
    """The 7B and the 67B model: 2T tokens, sequences of 4096, batches of 2304 and 4608 (section 2.3, table 2)."""
    rows = []
    for name, rate, sequences in (("v1_7b", 4.2e-4, 2304), ("v1_67b", 3.2e-4, 4608)):
        compute = preset(name).non_embedding_flops_per_token(4096) * 2e12
        rows.append(Setting(name, compute, rate, RATE.at(compute), sequences * 4096, BATCH.at(compute)))
    return rows


def synthetic_loss(compute: float) -> float:
    """The loss at the optimum of synthetic points."""
    return _LOSS.at(compute)


def synthetic_ladder(
    noise: float,
    seed: int,
    budgets: Sequence[float] = (1e17, 3e17, 1e18, 3e18, 6e18, 2e19, 1e20, 3e20),
    scales: int = 10,
) -> list[IsoFlop]:
    """IsoFLOP runs about the published M_opt, whose losses have `noise` (relative). V1 ran 8 budgets of 10 scales."""
    rng = np.random.default_rng(seed)
    ladder = []
    for compute in budgets:
        away_S = np.linspace(-1.2, 1.2, scales)
        losses_S = synthetic_loss(compute) + _CURVATURE * away_S**2
        losses_S *= 1 + noise * rng.standard_normal(scales)
        ladder.append(IsoFlop(compute, SCALE.at(compute) * np.exp(away_S), losses_S))
    return ladder
