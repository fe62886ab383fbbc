"""PSNR against the 16-bit model's images of the same seeds, averaged over images.

torchmetrics with data range (0, 1) and `dim=(1, 2, 3)`, per image, not pooled over the data set.
Identical images have an infinite PSNR; they count as the largest finite PSNR of two 8-bit images of
that size (one value differs by one step), so that a better image never lowers the mean. `details`
contains their number and this cap.
"""

from __future__ import annotations

import math
from typing import Any, Final

from loraq.metrics.common.image_set import ImageSet, paired_batches
from loraq.metrics.common.result import MetricResult, Options, mean, versions

NAME = "psnr"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "reference"
PER_IMAGE = True
KINDS: Final = ("image", "video")
ON_DEVICE = True
COUNTED = ("identical",)


def sources(options: Options) -> dict[str, Any]:
    return {"packages": versions("torchmetrics")}


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    values: list[float] = []
    identical = 0
    limit = 0.0
    for pair in paired_batches(images, reference, options):
        own, other = (batch.to(options.device) for batch in pair)
        limit = cap(own[0].numel())
        psnr = peak_signal_noise_ratio(
            own.double() / 255,
            other.double() / 255,
            data_range=(0.0, 1.0),
            dim=(1, 2, 3),
            reduction="none",
        )
        same = (own == other).flatten(1).all(dim=1).tolist()
        identical += sum(same)
        values += [
            limit if equal else value for value, equal in zip(psnr.tolist(), same, strict=True)
        ]
    details = {"data_range": [0.0, 1.0], "identical": identical, "cap": limit}
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


def cap(values: int) -> float:
    """PSNR of two 8-bit images with `values` numbers, one of which differs by one step."""
    return 10 * math.log10(255**2 * values)
