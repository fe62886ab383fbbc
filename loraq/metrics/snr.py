"""Signal-to-noise ratio against the 16-bit model's clips of the same seeds, per clip of sound.

    10 · log₁₀(Σ x′² / Σ (x − x′)²) dB

over all samples and channels of the clip x and its reference x′, in float64; offsets are kept. It
is to clips what PSNR is to images, and as strict: a shift by a few samples, which nobody hears,
costs most of it. Values count as at most 144.5 dB, the precision of the float32 in which samples
are kept (20 · log₁₀ 2²⁴), so that identical clips have a finite ratio; `details` has their number.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.audio_set import paired_clips
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options, mean, versions

NAME = "snr"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "reference"
PER_IMAGE = True
COUNTED = ("identical",)
KINDS: Final = ("audio",)
CAP = 20 * math.log10(2**24)


def sources(options: Options) -> dict[str, Any]:
    return {"packages": versions("numpy", "scipy")}


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    values: list[float] = []
    identical = 0
    for own, other in paired_clips(images, reference, options.workers):
        wanted_CN: np.ndarray = other.samples_CN.astype(np.float64)
        signal, noise = (
            float(np.square(part).sum()) for part in (wanted_CN, own.samples_CN - wanted_CN)
        )
        if not signal:
            name = images.names[len(values)]
            raise LoraqError(
                f"metric {NAME}: the reference of '{name}' is silent, so that it has no ratio. "
                f"Look at the 16-bit model, or leave {NAME} out of metrics.names."
            )
        identical += not noise
        values.append(min(CAP, 10 * math.log10(signal / noise)) if noise else CAP)
    details = {"identical": identical, "cap": CAP}
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)
