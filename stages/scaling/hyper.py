"""Learning rate and batch size against compute, V1's way: power laws through every near-optimal setting of the grids.

DeepSeek LLM (section 3.1) calls a setting near-optimal whose loss is within 0.25 % of its budget's best, and fits
η_opt = a·C^b and B_opt = a·C^b to all of them. A grid is coarse and a run is noisy, so an interval here covers both:
each draw disturbs the losses by the noise of a run, chooses again, and moves each budget's choice by up to half a
step of the grid.

Legend: G settings of one budget's grid, N bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.scaling.laws import Estimate, PowerLaw, estimate, near_optimal

DRAWS = 1000


@dataclass(frozen=True)
class Grid:
    """The runs of one compute budget over peak learning rates and batch sizes (tokens); a diverged run's loss is ∞."""

    compute: float
    rates_G: np.ndarray
    batches_G: np.ndarray
    losses_G: np.ndarray

    @property
    def edges(self) -> list[str]:
        """Which of η and B have a near-optimal value at the end of what was tried: the best may lie beyond."""
        near_G = near_optimal(self.losses_G)
        return [
            name
            for name, values_G in (("η", self.rates_G), ("B", self.batches_G))
            if np.ptp(values_G) > 0 and np.isin(values_G[near_G], (values_G.min(), values_G.max())).any()
        ]


@dataclass(frozen=True)
class HyperLaws:
    """η_opt and B_opt against compute, and the intervals of their exponents."""

    rate: PowerLaw
    batch: PowerLaw
    rate_exponent: Estimate
    batch_exponent: Estimate


def rate_law(grids: Sequence[Grid]) -> PowerLaw:
    """η_opt = a·C^b."""
    return _law(*_fit(grids, [grid.rates_G for grid in grids], [grid.losses_G for grid in grids]))


def batch_law(grids: Sequence[Grid]) -> PowerLaw:
    """B_opt = a·C^b, in tokens."""
    return _law(*_fit(grids, [grid.batches_G for grid in grids], [grid.losses_G for grid in grids]))


def fit_hyper(grids: Sequence[Grid], noise: float, seed: int = 0) -> HyperLaws:
    """Both laws with the intervals of their exponents; `noise` is the relative standard deviation of a run's loss."""
    rng = np.random.default_rng(seed)
    losses = [grid.losses_G * (1 + noise * rng.standard_normal((DRAWS, len(grid.losses_G)))) for grid in grids]

    def exponent(settings: Sequence[np.ndarray], law: PowerLaw) -> Estimate:
        if len(np.unique(np.concatenate(settings))) == 1:
            return Estimate(law.b)  # one value was tried: nothing is known of others
        moved = [values_G * np.exp(_step(values_G) * rng.uniform(-0.5, 0.5, (DRAWS, 1))) for values_G in settings]
        return estimate(law.b, _fit(grids, moved, losses)[1])

    rate, batch = rate_law(grids), batch_law(grids)
    return HyperLaws(
        rate,
        batch,
        exponent([grid.rates_G for grid in grids], rate),
        exponent([grid.batches_G for grid in grids], batch),
    )


def _fit(
    grids: Sequence[Grid], settings: Sequence[np.ndarray], losses: Sequence[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(ln a, b) through the near-optimal settings of all grids, for every row of settings and losses [..., G]."""
    x = np.concatenate([np.full(len(grid.losses_G), np.log(grid.compute)) for grid in grids])
    y, weight = np.log(np.concatenate(settings, -1)), np.concatenate([near_optimal(each) for each in losses], -1)
    mean_x, mean_y = (np.average(np.broadcast_to(v, weight.shape), -1, weight, keepdims=True) for v in (x, y))
    b = (weight * (x - mean_x) * (y - mean_y)).sum(-1) / (weight * (x - mean_x) ** 2).sum(-1)
    return mean_y[..., 0] - b * mean_x[..., 0], b


def _law(log_a: np.ndarray, b: np.ndarray) -> PowerLaw:
    return PowerLaw(float(np.exp(log_a)), float(b))


def _step(values_G: np.ndarray) -> float:
    """Mean distance of a grid's neighbours, in logs; 0 where the grid has one value."""
    values = np.unique(values_G)
    return float(np.log(values[-1] / values[0]) / max(1, len(values) - 1))
