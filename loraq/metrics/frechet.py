"""Fréchet distance between the features of images and real images of the same prompts.

    d² = ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2 (C₁C₂)^½)

Called `fid` with Inception features and `fd_<extractor>` otherwise. Images are resized as in
clean-fid. The trace of the root is a nuclear norm: with C = AᵀA, tr (C₁C₂)^½ = ‖A₁A₂ᵀ‖_*. The value
equals clean-fid's `frechet_distance` (tests), without a matrix root, which is ill-conditioned below
D samples and whose `scipy.linalg.sqrtm(disp=…)` call SciPy 1.18 has removed.

No interval: a resampled set has duplicates, which lower the rank of its covariance, so that the
bootstrap of this distance is biased upwards, most at small N. Shapes: N images, D features.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from loraq.metrics.common.distribution import compared_features, distance_name, distance_sources
from loraq.metrics.common.features import FeatureSet
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options

NAME = "frechet"
VERSION = "1"
DIRECTION: Final = "lower"
NEEDS: Final = "real"
PER_IMAGE = False
REASON = "no interval: its bootstrap is biased at small N; compare rows of one N only"


def sources(options: Options) -> dict[str, Any]:
    return distance_sources(options)


def compute(images: ImageSet, real: ImageSet | FeatureSet, options: Options) -> MetricResult:
    own, other, details = compared_features(images, real, options)
    value = frechet_distance(own.values, other.values)
    name = distance_name("fid", "fd", own.extractor)
    return MetricResult(name, DIRECTION, value, reason=REASON, details=details)


def frechet_distance(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """Squared Fréchet distance between Gaussians fitted to (N, D) and (N', D) features, float64."""
    difference = a_ND.mean(0, dtype=np.float64) - b_ND.mean(0, dtype=np.float64)
    a_KD, b_KD = _root(a_ND), _root(b_ND)
    cross = np.linalg.svd(a_KD @ b_KD.T, compute_uv=False).sum()
    distance = difference @ difference + (a_KD**2).sum() + (b_KD**2).sum() - 2 * cross
    return float(max(distance, 0.0))


def _root(features_ND: np.ndarray) -> np.ndarray:
    """A (K, D), K = min(N, D), such that AᵀA is the unbiased covariance."""
    centred: np.ndarray = features_ND.astype(np.float64)
    centred -= centred.mean(0)
    centred /= np.sqrt(len(centred) - 1)
    if centred.shape[0] <= centred.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))
