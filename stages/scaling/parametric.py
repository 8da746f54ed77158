"""Chinchilla's third way (2203.15556, section 3.3), a check on the parabolas: loss = E + A·M^−α + B·D^−β over all runs.

Its optimum for C = M·D has M ∝ C^(β/(α+β)). Least squares of the relative error stands in for the paper's Huber loss.

Legend: R runs of all budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from stages.scaling.isoflop import IsoFlop


@dataclass(frozen=True)
class Parametric:
    """loss = E + A·M^−α + B·D^−β."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    @property
    def scale_exponent(self) -> float:
        """Of M_opt against C."""
        return self.beta / (self.alpha + self.beta)

    def at(self, scale: float, tokens: float) -> float:
        return self.E + self.A * scale**-self.alpha + self.B * tokens**-self.beta


def fit_parametric(ladder: Sequence[IsoFlop]) -> Parametric:
    """E, A, B ≥ 0 by least squares; α and β by a grid, narrowed about its best."""
    log_M_R = np.log(np.concatenate([budget.scales_S for budget in ladder]))
    log_D_R = np.log(np.concatenate([np.full(len(budget.scales_S), budget.compute) for budget in ladder])) - log_M_R
    loss_R = np.concatenate([budget.losses_S for budget in ladder])
    mean_M, mean_D = log_M_R.mean(), log_D_R.mean()
    alphas = betas = np.geomspace(0.02, 2.0, 25)
    for _ in range(4):
        solved = [
            (_solve(np.exp(-alpha * (log_M_R - mean_M)), np.exp(-beta * (log_D_R - mean_D)), loss_R), alpha, beta)
            for alpha in alphas
            for beta in betas
        ]
        (_, (E, A, B)), alpha, beta = min(solved, key=lambda one: one[0][0])
        alphas, betas = _about(alphas, alpha), _about(betas, beta)
    return Parametric(
        float(E), float(A * np.exp(alpha * mean_M)), float(alpha), float(B * np.exp(beta * mean_D)), float(beta)
    )


def _solve(M_term_R: np.ndarray, D_term_R: np.ndarray, loss_R: np.ndarray) -> tuple[float, np.ndarray]:
    """(squared relative error, [E, A, B] ≥ 0): the best of all choices of which are not 0."""
    design_R3 = np.stack([np.ones_like(loss_R), M_term_R, D_term_R], axis=-1) / loss_R[:, None]
    best: tuple[float, np.ndarray] = (np.inf, np.zeros(3))
    for size in (1, 2, 3):
        for kept in map(list, combinations(range(3), size)):
            found = np.zeros(3)
            found[kept] = np.linalg.lstsq(design_R3[:, kept], np.ones_like(loss_R))[0]
            error = float(((design_R3 @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < best[0]:
                best = error, found
    return best


def _about(values: np.ndarray, best: float) -> np.ndarray:
    """A finer grid between the neighbours of the best value."""
    place = int(np.argmin(np.abs(values - best)))
    return np.geomspace(values[max(place - 1, 0)], values[min(place + 1, len(values) - 1)], 9)
