"""Bootstrap intervals over problems: the problem is the unit that was drawn, its k samples are not independent."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Interval:
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of the mean of `values` (one a problem). Deterministic by `seed`."""
    values_P = np.asarray(values, dtype=np.float64)
    assert values_P.ndim == 1, values_P.shape
    assert values_P.size, "no values to resample"
    rng = np.random.default_rng(seed)
    means = values_P[rng.integers(0, values_P.size, (resamples, values_P.size))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(values_P.mean()), float(low), float(high))


def paired_difference(left: Sequence[float], right: Sequence[float], **options: float) -> Interval:
    """Interval of mean(left − right), problem by problem: both lists speak of the same problems in the same order."""
    assert len(left) == len(right), (len(left), len(right))
    return bootstrap_mean(np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64), **options)
