"""Percentile bootstrap intervals, paired differences and Holm's correction over prompts.

The resampled unit is the prompt (one value per prompt). Vectorised numpy with a seed: the same
values give the same interval. Does not import torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loraq.errors import LoraqError

CONFIDENCE = 0.95


class Interval(NamedTuple):
    """A mean and its bootstrap interval; `lo` and `hi` are None for a single value."""

    mean: float
    lo: float | None
    hi: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.lo is not None and self.hi is not None and (self.lo > 0 or self.hi < 0)


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of `values` with percentile bootstrap 95 % interval (Efron 1979)."""
    array = _checked(values, samples)
    if len(array) < 2:
        return Interval(float(array.mean()), None, None)
    lo, hi = percentile_interval(_resampled_means(array, samples, seed))
    return Interval(float(array.mean()), lo, hi)


def paired_difference(
    a: Sequence[float], b: Sequence[float], samples: int = 2000, seed: int = 0
) -> Interval:
    """Mean of a_i − b_i over the same prompts i, with its bootstrap 95 % interval.

    Both methods use the same resampled prompts, so that the difficulty of a prompt cancels.
    """
    return bootstrap_interval(_differences(a, b), samples, seed)


def paired_test(
    a: Sequence[float], b: Sequence[float], samples: int = 2000, seed: int = 0
) -> tuple[Interval, float]:
    """`paired_difference` and the two-sided bootstrap p-value of "mean(a − b) = 0".

    p is twice the smaller tail of the resampled means at 0, with the +1 correction for a finite
    number of resamples, so that p ≥ 2 / (samples + 1). Both use the same resamples.
    """
    array = _checked(_differences(a, b), samples)
    if len(array) < 2:
        return Interval(float(array.mean()), None, None), 1.0
    means = _resampled_means(array, samples, seed)
    tail = min(int((means <= 0).sum()), int((means >= 0).sum()))
    p_value = min(1.0, 2 * (tail + 1) / (samples + 1))
    return Interval(float(array.mean()), *percentile_interval(means)), float(p_value)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979): adjusted p-values of a family of tests, same keys."""
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise LoraqError(f"p-value of {name!r} is {p}; it must be in [0, 1]")
    adjusted: dict[str, float] = {}
    running = 0.0
    ordered = sorted(p_values, key=lambda name: p_values[name])
    for rank, name in enumerate(ordered):
        running = max(running, min(1.0, (len(ordered) - rank) * p_values[name]))
        adjusted[name] = running
    return {name: adjusted[name] for name in p_values}


def percentile_interval(resampled: np.ndarray) -> tuple[float, float]:
    """The central 95 % interval of resampled statistics."""
    tail = (1 - CONFIDENCE) / 2
    lo, hi = np.quantile(resampled, [tail, 1 - tail])
    return float(lo), float(hi)


@functools.lru_cache(maxsize=2)
def resample_counts(n: int, samples: int, seed: int) -> np.ndarray:
    """How often each resample draws each of n prompts: (samples, n), each row sums to n.

    Cached for other metrics and rows with as many prompts, which use the same resamples.
    """
    drawn = np.random.default_rng(seed).integers(0, n, size=(samples, n))
    drawn += n * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * n).reshape(samples, n)
    counts = counts.astype(np.float64)
    counts.flags.writeable = False
    return counts


def _resampled_means(array: np.ndarray, samples: int, seed: int) -> np.ndarray:
    return resample_counts(len(array), samples, seed) @ array / len(array)


def _differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    if len(a) != len(b):
        raise LoraqError(
            f"a paired difference needs the same prompts: {len(a)} values against {len(b)}; "
            "measure both rows on one prompt list"
        )
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def _checked(values: Sequence[float] | np.ndarray, samples: int) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise LoraqError(f"an interval needs a non-empty list of values, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise LoraqError(f"{bad} of {array.size} values are not finite: they have no mean")
    if samples < 100:
        raise LoraqError(f"bootstrap samples = {samples}; at least 100 are needed, 2000 is usual")
    return array
