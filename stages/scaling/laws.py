"""The forms that DeepSeek LLM (2401.02954, section 3) fits, and their fits: pure functions of numbers.

A parabola in ln M gives the best scale of one compute budget, a straight line in logs a power law over budgets, and
separable least squares the loss at the optimum, E + A·C^−γ. All take leading dimensions, so that a bootstrap is one
call.

Legend: K compute budgets, S runs of one budget, N bootstrap draws, G values of γ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NEAR_OPTIMAL = 0.0025  # V1 (section 3.1): losses within 0.25 % of the best count as optimal


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; both ends None where nothing honest can be said."""

    value: float
    low: float | None = None
    high: float | None = None

    def __contains__(self, value: float) -> bool:
        return self.low is not None and self.high is not None and self.low <= value <= self.high


def estimate(value: float, draws_N: np.ndarray) -> Estimate:
    """`value` with the percentile interval of its bootstrap draws."""
    low, high = np.quantile(draws_N, (0.025, 0.975))
    return Estimate(float(value), float(low), float(high))


@dataclass(frozen=True)
class PowerLaw:
    """a·C^b."""

    a: float
    b: float

    def at(self, compute: float) -> float:
        return self.a * compute**self.b


@dataclass(frozen=True)
class SaturatingLaw:
    """E + A·C^−γ: what is left at infinite compute, and what compute still takes away."""

    E: float
    A: float
    gamma: float

    def at(self, compute: float) -> float:
        return self.E + self.A * compute**-self.gamma


def fit_log_line(compute_K: np.ndarray, y_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(ln a, b) of a·C^b by least squares in logs, for every row of y [..., K]."""
    x_K = np.log(compute_K)
    centred_K = x_K - x_K.mean()
    b_N = np.log(y_NK) @ centred_K / (centred_K @ centred_K)
    return np.log(y_NK).mean(-1) - b_N * x_K.mean(), b_N


def fit_power_law(compute_K: np.ndarray, y_K: np.ndarray) -> PowerLaw:
    """a·C^b by least squares in logs."""
    log_a, b = fit_log_line(compute_K, y_K)
    return PowerLaw(float(np.exp(log_a)), float(b))


def fit_saturating(compute_K: np.ndarray, loss_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(E, A, γ) of each row, E and A at least 0, by least squares of the relative error.

    For a given γ the form is linear in E and A, so only γ is searched: a geometric grid, narrowed about its best.
    """
    centre = np.log(compute_K).mean()
    x_K, rows_N = np.log(compute_K) - centre, np.arange(len(loss_NK))
    low_N, high_N = np.full(len(loss_NK), 1e-3), np.full(len(loss_NK), 3.0)
    for _ in range(6):
        gamma_NG = np.geomspace(low_N, high_N, 17, axis=-1)
        E_NG, A_NG, error_NG = _solve_linear(np.exp(-gamma_NG[..., None] * x_K), loss_NK)
        best_N = error_NG.argmin(-1)
        low_N, high_N = gamma_NG[rows_N, np.maximum(best_N - 1, 0)], gamma_NG[rows_N, np.minimum(best_N + 1, 16)]
    gamma_N = gamma_NG[rows_N, best_N]
    return E_NG[rows_N, best_N], A_NG[rows_N, best_N] * np.exp(gamma_N * centre), gamma_N


def _solve_linear(power_NGK: np.ndarray, loss_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """E, A ≥ 0 that minimise Σ ((E + A·power)/loss − 1)², and that sum; each [N, G]. By the normal equations."""
    inverse_NK = 1 / loss_NK
    e1, ee = inverse_NK.sum(-1)[:, None], (inverse_NK**2).sum(-1)[:, None]
    a1, ea = (np.einsum("ngk,nk->ng", power_NGK, weight_NK) for weight_NK in (inverse_NK, inverse_NK**2))
    aa = np.einsum("ngk,ngk,nk->ng", power_NGK, power_NGK, inverse_NK**2)
    determinant = np.maximum(ee * aa - ea**2, 1e-12 * ee * aa)
    E_NG, A_NG = (e1 * aa - a1 * ea) / determinant, (a1 * ee - e1 * ea) / determinant
    E_NG, A_NG = np.where(A_NG < 0, e1 / ee, E_NG), np.where(E_NG < 0, a1 / aa, A_NG)
    E_NG, A_NG = np.maximum(E_NG, 0), np.maximum(A_NG, 0)
    error_NG = E_NG**2 * ee + 2 * E_NG * A_NG * ea + A_NG**2 * aa - 2 * E_NG * e1 - 2 * A_NG * a1 + loss_NK.shape[-1]
    return E_NG, A_NG, error_NG


@dataclass(frozen=True)
class Parabola:
    """q₀ + q₁·x + q₂·x² in x = ln M − centre, over scales from `low` to `high` (in x); one row of q a draw."""

    centre: float
    low: float
    high: float
    q_N3: np.ndarray

    def at(self, scales_S: np.ndarray) -> np.ndarray:
        """Losses [N, S]."""
        return self.q_N3 @ np.vander(np.log(scales_S) - self.centre, 3, increasing=True).T

    def optimum(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(M, loss, bracketed) of each row: the vertex, or the better end of the range where no minimum lies inside."""
        q0, q1, q2 = self.q_N3.T
        with np.errstate(divide="ignore", invalid="ignore"):
            vertex_N = -q1 / (2 * q2)
        bracketed_N = (q2 > 0) & (vertex_N > self.low) & (vertex_N < self.high)
        ends_2 = np.array([self.low, self.high])
        ends_N = ends_2[(q0 + q1 * ends_2[:, None] + q2 * ends_2[:, None] ** 2).argmin(0)]
        x_N = np.where(bracketed_N, vertex_N, ends_N)
        return np.exp(x_N + self.centre), q0 + q1 * x_N + q2 * x_N**2, bracketed_N


def fit_parabola(scales_S: np.ndarray, loss_NS: np.ndarray) -> Parabola:
    """Least squares in ln M for each row of losses; needs three different scales."""
    assert len(np.unique(scales_S)) >= 3, scales_S
    x_S = np.log(scales_S)
    centre = x_S.mean()
    design_S3 = np.vander(x_S - centre, 3, increasing=True)
    return Parabola(centre, x_S.min() - centre, x_S.max() - centre, loss_NS @ np.linalg.pinv(design_S3).T)


def near_optimal(losses: np.ndarray) -> np.ndarray:
    """Which losses of a row lie within 0.25 % of its least; a run that diverged (infinite loss) never does."""
    return losses <= losses.min(-1, keepdims=True) * (1 + NEAR_OPTIMAL)
