"""Kernel inception distance (Bińkowski et al. 2018): unbiased MMD² of features, with interval.

    KID = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{i,j} k(x_i, y_j),
    k(a, b) = (a·b / D + 1)³

clean-fid averages over random subsets of at most 1000 images; here all images are used once, which
gives the same value for N ≤ 1000 and needs no random numbers. Called `kid` with Inception features
and `kid_<extractor>` otherwise.

Interval: bootstrap over prompts. In a resample, prompt i has the weight w_i (how often it was
drawn), and a pair of different prompts w_i·w_j. No image is compared with its own copy, so that the
resampled estimates are centred on the value. The images and real images of a prompt are drawn
together. With few prompts a resample holds few different pairs, so that there is no interval below
`SMALLEST_RESAMPLED` prompts.
"""

from __future__ import annotations

import functools
from typing import Any, Final, NamedTuple

import numpy as np

from loraq.metrics.common.distribution import compared_features, distance_name, distance_sources
from loraq.metrics.common.features import FeatureSet
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.intervals import CONFIDENCE, too_few_resampled
from loraq.metrics.common.result import MetricResult, Options

NAME = "kid"
VERSION = "1"
DIRECTION: Final = "lower"
NEEDS: Final = "real"
PER_IMAGE = False


def sources(options: Options) -> dict[str, Any]:
    return distance_sources(options)


def compute(images: ImageSet, real: ImageSet | FeatureSet, options: Options) -> MetricResult:
    own, other, details = compared_features(images, real, options)
    kernels = make_kernels(own.values, other.values)
    paired, reason = own.names == other.names, too_few_resampled(min(len(own), len(other)))
    interval = None
    if not reason:
        interval = kernel_interval(kernels, paired, options.bootstrap, options.seed)
    details["kernel"] = "(x·y/D + 1)^3, unbiased, all images"
    name, value = distance_name("kid", "kid", own.extractor), kernel_distance(kernels)
    return MetricResult(name, DIRECTION, value, interval=interval, reason=reason, details=details)


class Kernels(NamedTuple):
    """k(x_i, x_j), k(y_i, y_j) and k(x_i, y_j) of N features x and M features y, in float64."""

    xx: np.ndarray
    yy: np.ndarray
    xy: np.ndarray


def make_kernels(x_ND: np.ndarray, y_MD: np.ndarray) -> Kernels:
    x: np.ndarray = x_ND.astype(np.float64)
    y: np.ndarray = y_MD.astype(np.float64)
    pairs = ((x, x), (y, y), (x, y))
    return Kernels(*((a @ b.T / x.shape[1] + 1) ** 3 for a, b in pairs))


def kernel_distance(kernels: Kernels) -> float:
    """Unbiased squared MMD with the cubic kernel, in float64."""
    xx, yy, xy = kernels
    n, m = len(xx), len(yy)
    own = (xx.sum() - np.trace(xx)) / (n * (n - 1))
    other = (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return float(own + other - 2 * xy.mean())


def kernel_interval(kernels: Kernels, paired: bool, samples: int, seed: int) -> tuple[float, float]:
    """Bootstrap 95 % interval of `kernel_distance`; `paired`: row i of x and y have one prompt."""
    xx, yy, xy = kernels
    w_BN = resample_counts(len(xx), samples, seed)
    v_BM = w_BN if paired else resample_counts(len(yy), samples, seed + 1)
    own, other = _between_different(xx, w_BN, w_BN), _between_different(yy, v_BM, v_BM)
    if paired:
        n = len(xx)
        same = w_BN @ np.diag(xy) / n
        cross = ((n - 1) * _between_different(xy, w_BN, w_BN) + same) / n
    else:
        cross = ((w_BN @ xy) * v_BM).sum(1) / (len(xx) * len(yy))
    tail = (1 - CONFIDENCE) / 2
    lo, hi = np.quantile(own + other - 2 * cross, [tail, 1 - tail])
    return float(lo), float(hi)


@functools.lru_cache(maxsize=2)
def resample_counts(n: int, samples: int, seed: int) -> np.ndarray:
    """How often each resample draws each of n prompts: (samples, n), each row sums to n.

    Cached for other rows with as many prompts, which use the same resamples.
    """
    drawn = np.random.default_rng(seed).integers(0, n, size=(samples, n))
    drawn += n * np.arange(samples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=samples * n).reshape(samples, n)
    counts = counts.astype(np.float64)
    counts.flags.writeable = False
    return counts


def _between_different(k_NN: np.ndarray, w_BN: np.ndarray, v_BN: np.ndarray) -> np.ndarray:
    """Weighted mean of k over pairs of different prompts, for each resample: (B,)."""
    off = k_NN - np.diag(np.diag(k_NN))
    weights = w_BN.sum(1) * v_BN.sum(1) - (w_BN * v_BN).sum(1)
    return ((w_BN @ off) * v_BN).sum(1) / np.maximum(weights, 1.0)
