"""Fréchet distance of feature distributions to the real images of the same prompts.

    d² = ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)

Called `fid` on Inception features and `fd_<extractor>` on any other. Resizing is clean-fid's. The
root's trace is taken as a nuclear norm: with C = AᵀA, tr (C₁C₂)^½ = ‖A₁A₂ᵀ‖_*. This is the same
number as clean-fid's `frechet_distance` (tests), but needs no matrix root, which is ill-conditioned
below D samples and whose `scipy.linalg.sqrtm(disp=…)` call is gone from SciPy 1.18.

Shown without an interval: a resampled set has duplicates, which lowers its covariance's rank, so
the bootstrap of this distance is biased upwards, most at small N. Shapes: N images, D features.
"""

from __future__ import annotations

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.features import FeatureSet, choose, features_of
from loraq.metrics.common.features import check as check_extractor
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options, versions

NAME = "frechet"
VERSION = "1"
DIRECTION = "lower"
NEEDS = "real"
PER_IMAGE = False
REASON = "no interval: its bootstrap is biased at small N; compare rows of one N only"


def check(options: Options, real: ImageSet | FeatureSet | None = None) -> None:
    check_extractor(choose(options.extractor, real))


def compute(images: ImageSet, real: ImageSet | FeatureSet, options: Options) -> MetricResult:
    extractor = choose(options.extractor, real)
    own = features_of(images, extractor, options)
    other = features_of(real, extractor, options)
    details = {
        **own.details,
        "packages": {**own.details.get("packages", {}), **versions("numpy")},
        "mode": "clean",
        "n": len(own),
        "n_real": len(other),
        "real_hash": other.hash,
    }
    value = frechet_distance(own.values, other.values)
    name = "fid" if extractor == "inception" else f"fd_{extractor}"
    return MetricResult(name, DIRECTION, value, reason=REASON, details=details)


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two feature sets, in float64."""
    if min(len(a_ND), len(b_ND)) < 2:
        raise LoraqError(f"a covariance needs 2 images, got {len(a_ND)} and {len(b_ND)}")
    difference = a_ND.mean(0, dtype=np.float64) - b_ND.mean(0, dtype=np.float64)
    a_KD, b_KD = _root(a_ND), _root(b_ND)
    cross = np.linalg.svd(a_KD @ b_KD.T, compute_uv=False).sum()
    distance = difference @ difference + (a_KD**2).sum() + (b_KD**2).sum() - 2 * cross
    return float(max(distance, 0.0))


def _root(features_ND: np.ndarray) -> np.ndarray:
    """A (K, D) with AᵀA the unbiased covariance, K = min(N, D)."""
    centred: np.ndarray = features_ND.astype(np.float64)
    centred -= centred.mean(0)
    centred /= np.sqrt(len(centred) - 1)
    if centred.shape[0] <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))
