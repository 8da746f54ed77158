"""Bootstrap intervals over contents: a problem's k samples, and its twins in other words, are not independent draws."""

from __future__ import annotations

import dataclasses
import math
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
    values: Sequence[float] | np.ndarray,
    clusters: Sequence[str] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean of `values` (one a problem). Deterministic by `seed`.

    Problems of one cluster (the same numbers in another language or order) are drawn together: they are not
    independent, and resampling them one by one would make the interval too short.
    """
    values_P = np.asarray(values, dtype=np.float64)
    assert values_P.ndim == 1, values_P.shape
    assert values_P.size, "no values to resample"
    names_P = np.arange(values_P.size) if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    interval = bootstrap_ratio(np.bincount(names_P, values_P), np.bincount(names_P), level, resamples, seed)
    return dataclasses.replace(interval, mean=float(values_P.mean()))


def bootstrap_ratio(
    sums_C: np.ndarray, sizes_C: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Percentile interval of Σ sums / Σ sizes over clusters that are drawn whole."""
    drawn_RC = np.random.default_rng(seed).integers(0, len(sizes_C), (resamples, len(sizes_C)))
    means = sums_C[drawn_RC].sum(axis=1) / sizes_C[drawn_RC].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(sums_C.sum() / sizes_C.sum()), float(low), float(high))


def bootstrap_share(values: Sequence[float], clusters: Sequence[str], seed: int = 0) -> Interval:
    """`bootstrap_mean` of values in [0, 1]. Where all agree it has no width: then the ends are Wilson's, of as many
    draws as there are clusters."""
    interval = bootstrap_mean(values, clusters, seed=seed)
    if interval.low < interval.high:
        return interval
    n = len(set(clusters))
    return dataclasses.replace(wilson(interval.mean * n, n), mean=interval.mean)


def wilson(successes: float, n: int, z: float = 1.96) -> Interval:
    """Wilson's 95 % interval of a share (1927): honest at 0 and n successes, where a bootstrap has no width."""
    assert 0 <= successes <= n, (successes, n)
    assert n, "a share of nothing"
    share = successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def paired_difference(
    left: Sequence[float], right: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> Interval:
    """Interval of mean(left − right), problem by problem: both lists speak of the same problems in the same order."""
    assert len(left) == len(right), (len(left), len(right))
    return bootstrap_mean(np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64), clusters, seed=seed)
