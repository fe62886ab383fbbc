"""SSIM (Wang et al. 2004) against the 16-bit model's images of the same seeds, per image.

torchmetrics with its defaults: Gaussian window of 11 pixels, σ = 1.5, K = (0.01, 0.03), range 1.
In float32, whose round-off in the variances (mean of squares − squared mean) changes the SSIM of
flat images by up to 4e-5.
"""

from __future__ import annotations

from typing import Any, Final

from loraq.metrics.common.image_set import ImageSet, paired_batches
from loraq.metrics.common.result import MetricResult, Options, mean, versions

NAME = "ssim"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "reference"
PER_IMAGE = True
KINDS: Final = ("image", "video")
ON_DEVICE = True
SMALLEST = 11  # pixels of a side: the window


def sources(options: Options) -> dict[str, Any]:
    return {"packages": versions("torchmetrics")}


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    from torchmetrics.functional.image import structural_similarity_index_measure

    values: list[float] = []
    for pair in paired_batches(images, reference, options, SMALLEST):
        own, other = (batch.to(options.device) for batch in pair)
        ssim = structural_similarity_index_measure(
            own.float() / 255,
            other.float() / 255,
            kernel_size=SMALLEST,
            data_range=1.0,
            reduction="none",
        )
        values += ssim.double().tolist()
    details = {"window": SMALLEST, "data_range": 1.0}
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)
