"""Fréchet distance to the 16-bit model's images of the same seeds: `frechet` without real images.

Called `fid_reference` with Inception features and `fd_reference_<extractor>` otherwise. The
SVDQuant reference reports it beside the FID to real images.
"""

from __future__ import annotations

from typing import Any, Final

from loraq.metrics.common.distribution import compared_features, distance_name, distance_sources
from loraq.metrics.common.features import choose_extractor
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options
from loraq.metrics.frechet import REASON, frechet_distance

NAME = "frechet_reference"
VERSION = "1"
DIRECTION: Final = "lower"
NEEDS: Final = "reference"
PER_IMAGE = False


def sources(options: Options) -> dict[str, Any]:
    return distance_sources(options)


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    own, other, details = compared_features(images, reference, options)
    value = frechet_distance(own.values, other.values)
    details["reference_hash"] = details.pop("real_hash")
    details.pop("n_real")  # as many as images
    return MetricResult(result_name(options), DIRECTION, value, reason=REASON, details=details)


def result_name(options: Options) -> str:
    """The name of the value, which follows from the extractor."""
    return distance_name("fid_reference", "fd_reference", choose_extractor(options.extractor))
