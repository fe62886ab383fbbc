"""What metrics of distributions have in common: the features of images and of real images."""

from __future__ import annotations

from typing import Any

from loraq.errors import LoraqError
from loraq.metrics.common.features import (
    ExtractorName,
    FeatureSet,
    choose_extractor,
    extractor_sources,
    features_of,
)
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import Options, versions


def distance_sources(options: Options) -> dict[str, Any]:
    """What computes a distance between features."""
    found = extractor_sources(choose_extractor(options.extractor))
    return {**found, "packages": {**found["packages"], **versions("numpy")}}


def compared_features(
    images: ImageSet, real: ImageSet | FeatureSet, options: Options
) -> tuple[FeatureSet, FeatureSet, dict[str, Any]]:
    """The features of both sets, and the details of the result; LoraqError below two images."""
    extractor = choose_extractor(options.extractor, real)
    own, other = (features_of(part, extractor, options) for part in (images, real))
    if min(len(own), len(other)) < 2:
        raise LoraqError(
            f"a distance of distributions needs 2 images per set, got {len(own)} and {len(other)}"
        )
    details = {"mode": "clean", "n": len(own), "n_real": len(other), "real_hash": other.hash}
    return own, other, details


def distance_name(inception: str, other: str, extractor: ExtractorName) -> str:
    """`inception`, the published name, for Inception's features; otherwise OTHER_EXTRACTOR."""
    return inception if extractor == "inception" else f"{other}_{extractor}"
