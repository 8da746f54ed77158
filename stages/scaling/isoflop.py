"""From the ladder's losses to the laws: optimal scale and tokens, and loss, against compute; and how sure they are.

Each budget's parabola gives an optimum, the optima give the laws (DeepSeek LLM, section 3.2). Intervals come from a
parametric bootstrap: what the parabolas leave over is the noise of one run, relative to its loss and pooled over
budgets; every draw takes a noise level that fits so few residuals (a scaled inverse χ²), makes new losses about the
parabolas and fits everything again. They cover the noise of runs, and presume that the forms hold.

Legend: K compute budgets, S runs of one budget, N bootstrap draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.scaling.laws import (
    Estimate,
    Parabola,
    PowerLaw,
    SaturatingLaw,
    estimate,
    fit_log_line,
    fit_parabola,
    fit_power_law,
    fit_saturating,
)

DRAWS = 1000


@dataclass(frozen=True)
class IsoFlop:
    """The runs of one compute budget: their scales M and losses, repeats of a scale included."""

    compute: float
    scales_S: np.ndarray
    losses_S: np.ndarray


@dataclass(frozen=True)
class Optimum:
    """A budget's optimum; `bracketed` is False where the parabola has no minimum inside the scales that were run."""

    compute: float
    scale: float
    tokens: float
    loss: float
    bracketed: bool


@dataclass(frozen=True)
class Draws:
    """Bootstrap draws of the laws' coefficients, and of the relative noise of one run."""

    log_scale_N: np.ndarray
    scale_exponent_N: np.ndarray
    E_N: np.ndarray
    A_N: np.ndarray
    gamma_N: np.ndarray
    run_noise_N: np.ndarray


@dataclass(frozen=True)
class Laws:
    """M_opt = a·C^α, D_opt = a·C^β and loss = E + A·C^−γ over the ladder's optima."""

    curves: tuple[Parabola, ...]
    optima: tuple[Optimum, ...]
    scale: PowerLaw
    tokens: PowerLaw
    loss: SaturatingLaw
    noise: float  # relative standard deviation of one run's loss about its parabola
    draws: Draws

    @property
    def scale_exponent(self) -> Estimate:
        return estimate(self.scale.b, self.draws.scale_exponent_N)

    @property
    def tokens_exponent(self) -> Estimate:
        return estimate(self.tokens.b, 1 - self.draws.scale_exponent_N)

    @property
    def loss_exponent(self) -> Estimate:
        return estimate(self.loss.gamma, self.draws.gamma_N)

    @property
    def loss_offset(self) -> Estimate:
        return estimate(self.loss.E, self.draws.E_N)

    def scale_at(self, compute: float) -> Estimate:
        """M_opt with its interval."""
        draws = self.draws
        return estimate(self.scale.at(compute), np.exp(draws.log_scale_N + draws.scale_exponent_N * np.log(compute)))

    def loss_at(self, compute: float, of_a_run: bool = True) -> Estimate:
        """The loss at the optimum, with the prediction interval of one run, or the interval of the law alone."""
        draws = self.draws
        loss_N = draws.E_N + draws.A_N * compute**-draws.gamma_N
        return estimate(self.loss.at(compute), loss_N * (1 + draws.run_noise_N) if of_a_run else loss_N)


def fit_laws(ladder: Sequence[IsoFlop], seed: int = 0) -> Laws:
    """All laws of a ladder of at least three budgets, each with at least four scales. Deterministic by `seed`."""
    compute_K = np.array([budget.compute for budget in ladder])
    curves = [fit_parabola(budget.scales_S, budget.losses_S[None]) for budget in ladder]
    optima = []
    for budget, curve in zip(ladder, curves, strict=True):
        scale, loss, bracketed = (float(value[0]) for value in curve.optimum())
        optima.append(Optimum(budget.compute, scale, budget.compute / scale, loss, bool(bracketed)))
    fitted = [curve.at(budget.scales_S)[0] for budget, curve in zip(ladder, curves, strict=True)]
    residuals = np.concatenate([budget.losses_S / fit - 1 for budget, fit in zip(ladder, fitted, strict=True)])
    freedom = len(residuals) - 3 * len(ladder)
    noise = float(np.sqrt((residuals**2).sum() / freedom))

    rng = np.random.default_rng(seed)
    noise_N = noise * np.sqrt(freedom / rng.chisquare(freedom, DRAWS))
    scale_NK, loss_NK = np.empty((DRAWS, len(ladder))), np.empty((DRAWS, len(ladder)))
    for k, (budget, fit) in enumerate(zip(ladder, fitted, strict=True)):
        losses_NS = fit * (1 + noise_N[:, None] * rng.standard_normal((DRAWS, len(fit))))
        scale_NK[:, k], loss_NK[:, k], _ = fit_parabola(budget.scales_S, losses_NS).optimum()
    E, A, gamma = fit_saturating(compute_K, np.array([[optimum.loss for optimum in optima]]))
    return Laws(
        curves=tuple(curves),
        optima=tuple(optima),
        scale=fit_power_law(compute_K, np.array([optimum.scale for optimum in optima])),
        tokens=fit_power_law(compute_K, np.array([optimum.tokens for optimum in optima])),
        loss=SaturatingLaw(float(E[0]), float(A[0]), float(gamma[0])),
        noise=noise,
        draws=Draws(
            *fit_log_line(compute_K, scale_NK),
            *fit_saturating(compute_K, loss_NK),
            run_noise_N=noise_N * rng.standard_normal(DRAWS),
        ),
    )
