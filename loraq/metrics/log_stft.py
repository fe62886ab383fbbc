"""Distance of log magnitudes of short-time Fourier transforms, per clip of sound.

    mean over resolutions, channels, frequencies and times of |ln max(|S|, ε) − ln max(|S′|, ε)|

S and S′ are the transforms of the clip and of the 16-bit model's clip of the same seed. This is the
log magnitude term of the multi-resolution STFT loss of Parallel WaveGAN (Yamamoto et al. 2020,
arXiv:1910.11480) at its three resolutions: (points of the transform, samples of the Hann window,
hop) = (1024, 600, 120), (2048, 1200, 240), (512, 240, 50), each with the same weight. The window is
periodic and lies in the middle of the transform; the signal is padded by reflection with half a
transform at both ends. ε = 1e-5, so that silence has a finite distance. Computed in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loraq.metrics.common.audio_set import paired_clips
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options, mean, versions

if TYPE_CHECKING:
    from torch import Tensor

NAME = "log_stft"
VERSION = "1"
DIRECTION: Final = "lower"
NEEDS: Final = "reference"
PER_IMAGE = True
ON_DEVICE = True
KINDS: Final = ("audio",)
RESOLUTIONS = ((1024, 600, 120), (2048, 1200, 240), (512, 240, 50))
FLOOR = 1e-5
SMALLEST = 1025  # samples: the padding of the longest transform must be shorter than the clip


def sources(options: Options) -> dict[str, Any]:
    return {"packages": versions("torch", "scipy")}


def compute(images: ImageSet, reference: ImageSet, options: Options) -> MetricResult:
    import torch

    values: list[float] = []
    with torch.inference_mode():
        for pair in paired_clips(images, reference, options.workers, SMALLEST):
            own, other = (
                torch.from_numpy(clip.samples_CN).to(options.device).double() for clip in pair
            )
            values.append(log_stft_distance(own, other))
    details = {"resolutions": [list(sizes) for sizes in RESOLUTIONS], "floor": FLOOR}
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


def log_stft_distance(own_CN: Tensor, other_CN: Tensor) -> float:
    """The distance of two clips of equal shape (C channels, N samples)."""
    import torch

    distances = []
    for sizes in RESOLUTIONS:
        logs = [log_magnitudes(clip_CN, *sizes) for clip_CN in (own_CN, other_CN)]
        distances.append((logs[0] - logs[1]).abs().mean())
    return mean(torch.stack(distances).tolist())  # the host waits once


def log_magnitudes(clip_CN: Tensor, points: int, window: int, hop: int) -> Tensor:
    """ln max(|S|, ε) of every channel, frequency and time."""
    import torch

    hann = torch.hann_window(window, dtype=clip_CN.dtype, device=clip_CN.device)
    transformed = torch.stft(clip_CN, points, hop, window, hann, return_complex=True)
    return transformed.abs().clamp_min(FLOOR).log()
