"""Intervals of a mean over prompts, tests of paired differences, and Holm's correction.

The sampled unit is the prompt, with one value per prompt. Two intervals of the mean are computed,
and the outer ends count: Student's t, which holds for symmetric values, and the same with Hall's
correction for skewness (1992), which holds for skewed ones:

    z = (mean − μ) / s,   T(z) = √n·(z + g·z²/3 + g²·z³/27 + g/(6n)),   T is Student's t

    n values, s: their standard deviation, g: their skewness

A difference must also pass a sign-flip test. It is exact at every N, for rows that could be
exchanged at each prompt. The smallest N below come from the error rates that
`experiments/bench/errors.py` measures. The same values give the same results. No torch.

Shapes: N prompts, R rows of a table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from loraq.errors import LoraqError

CONFIDENCE = 0.95
SMALLEST_INTERVAL = 8
"""Number of prompts from which a mean has an interval; with fewer, skewed means are not covered."""
SMALLEST_VERDICT = 32
"""Number of prompts from which a paired difference can be called better or worse."""
SMALLEST_RESAMPLED = 32
"""Number of images from which a metric of the complete set (KID) has an interval by resampling."""
FLIPS = 400
"""Sign flips for each row of a family, so that p-values stay well resolved after correction."""
FEWEST_FLIPS = 10_000
CHUNK = 2**19  # random signs held at once


class Interval(NamedTuple):
    """A mean and its 95 % interval; `lo` and `hi` are None for fewer than `SMALLEST_INTERVAL`."""

    mean: float
    lo: float | None
    hi: float | None

    @property
    def excludes_zero(self) -> bool:
        return self.lo is not None and self.hi is not None and (self.lo > 0 or self.hi < 0)


def mean_interval(values: Sequence[float] | np.ndarray) -> Interval:
    """Mean of `values` with its 95 % interval."""
    array = _checked(values)
    mean = float(array.mean())
    if len(array) < SMALLEST_INTERVAL:
        return Interval(mean, None, None)
    lo, hi = interval_ends(array[:, None])
    return Interval(mean, float(lo[0]), float(hi[0]))


def too_few(n: int, smallest: int = SMALLEST_INTERVAL, wanted: str = "an interval") -> str:
    """The reason why `n` images do not give what is `wanted`; "" if they do."""
    return "" if n >= smallest else f"too few images (N < {smallest}) for {wanted}"


def too_few_resampled(n: int) -> str:
    """The reason why a metric of a complete set of `n` images has no interval; "" if it has one."""
    return too_few(n, SMALLEST_RESAMPLED, "an interval by resampling")


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of a_i − b_i over the same prompts i, with its 95 % interval.

    The difficulty of a prompt cancels.
    """
    return mean_interval(differences(a, b))


def differences(a: Sequence[float], b: Sequence[float]) -> np.ndarray:
    """The values a_i − b_i; LoraqError if the two have different lengths."""
    if len(a) != len(b):
        raise LoraqError(
            f"a paired difference needs the same prompts: {len(a)} values against {len(b)}; "
            "measure both rows on one prompt list"
        )
    return np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)


def paired_p_values(differences_NR: np.ndarray, flips: int | None = None) -> np.ndarray:
    """Two-sided p-values (R,) of "the mean is 0": the largest of Student's, Hall's and sign flips'.

    flips: their number; by default enough for Holm's correction over the R rows. With fewer than
    `SMALLEST_VERDICT` prompts every p-value is 1.
    """
    n, rows = differences_NR.shape
    if n < SMALLEST_VERDICT:
        return np.ones(rows)
    flips = max(FEWEST_FLIPS, FLIPS * rows) if flips is None else flips
    return np.maximum(mean_p_values(differences_NR), sign_flip_p_values(differences_NR, flips))


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


def interval_ends(values_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends (R,) of the 95 % intervals of the columns' means."""
    from scipy.special import stdtrit

    n = len(values_NR)
    mean_R, s_R, g_R = _moments(values_NR)
    bound = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) / np.sqrt(n)
    upper, lower = _inverse(bound, g_R, n), _inverse(-bound, g_R, n)
    return mean_R - s_R * np.maximum(bound, upper), mean_R - s_R * np.minimum(-bound, lower)


def mean_p_values(values_NR: np.ndarray) -> np.ndarray:
    """p-values (R,) of "the mean is 0" that belong to `interval_ends`."""
    from scipy.special import stdtr

    n = len(values_NR)
    mean_R, s_R, g_R = _moments(values_NR)
    constant = s_R == 0
    z_R = mean_R / np.where(constant, 1.0, s_R)
    corrected = z_R + g_R * z_R**2 / 3 + g_R**2 * z_R**3 / 27 + g_R / (6 * n)
    least = np.sqrt(n) * np.minimum(np.abs(z_R), np.abs(corrected))
    least[constant & (mean_R != 0)] = np.inf
    p_values: np.ndarray = 2 * stdtr(n - 1, -least)
    return p_values


def sign_flip_p_values(values_NR: np.ndarray, flips: int, seed: int = 0) -> np.ndarray:
    """p-values (R,) of "each column is symmetric about 0": (1 + reached) / (1 + flips).

    All columns get the same random signs; `reached` counts flips whose sum is at least as large.
    """
    n, rows = values_NR.shape
    generator = np.random.default_rng(seed)
    total_R = values_NR.sum(0)
    least_R = np.abs(total_R) * (1 - 1e-12)  # equal sums, added in another order
    reached = np.zeros(rows)
    for start in range(0, flips, step := max(1, CHUNK // n)):
        packed = generator.bytes(min(step, flips - start) * (width := -(-n // 8)))
        bits = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(-1, width), axis=1, count=n)
        flipped = total_R - 2 * (bits.astype(np.float64) @ values_NR)
        reached += (np.abs(flipped) >= least_R).sum(0)
    return (1 + reached) / (1 + flips)


def _moments(values_NR: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and skewness (0 for constant values) of each column."""
    mean_R, s_R = values_NR.mean(0), values_NR.std(0, ddof=1)
    s_R = np.where(np.ptp(values_NR, axis=0) == 0, 0.0, s_R)
    third_R = ((values_NR - mean_R) ** 3).mean(0)
    return mean_R, s_R, third_R / np.where(s_R == 0, 1.0, s_R) ** 3


def _inverse(bound: float, g_R: np.ndarray, n: int) -> np.ndarray:
    """The z for which T(z) = √n·bound: 3/g·(c − 1), written without cancellation at g = 0."""
    y_R = bound - g_R / (6 * n)
    c_R = np.cbrt(1 + g_R * y_R)
    z_R: np.ndarray = 3 * y_R / (c_R**2 + c_R + 1)
    return z_R


def _checked(values: Sequence[float] | np.ndarray) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise LoraqError(f"an interval needs a non-empty list of values, got shape {array.shape}")
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise LoraqError(f"{bad} of {array.size} values are not finite: they have no mean")
    return array
