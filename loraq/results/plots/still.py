"""A picture of an output: an image itself, frames of a video in a strip, a clip's sound drawn."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.audio_set import Clip, read_clip
from loraq.metrics.common.kinds import kind_of_file
from loraq.metrics.common.reading import read_video
from loraq.utils.kinds import UNITS, Kind

FRAMES = 5
"""Of a video in its strip, at most: the first, the last and others at equal distances."""
BETWEEN = 2  # pixels
PAPER, INK = 255, (31, 90, 150)
WIDTH, WAVE, SPECTRUM = 384, 96, 128  # pixels of a drawn clip
DECIBELS = 100.0
"""Range of a spectrogram's colours, below a full-scale tone."""


def still(path: Path) -> Any:
    """The picture of an output's file, a PIL image in RGB; LoraqError if it cannot be read."""
    from PIL import Image, UnidentifiedImageError

    kind = kind_of_file(path)
    if kind == "audio":
        return Image.fromarray(drawn_clip(read_clip(path)))
    if kind == "video":
        return Image.fromarray(strip(read_video(path)))
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise LoraqError(f"Cannot read the image {path}: {error}") from error


def shown_frames(frames: int) -> list[int]:
    """The places of the frames in a strip, the first and the last among them."""
    return sorted({round(place) for place in np.linspace(0, frames - 1, FRAMES)})


def strip(video_FHWC: np.ndarray) -> np.ndarray:
    """Some frames side by side: uint8 (H, W', 3)."""
    shown = [video_FHWC[place] for place in shown_frames(len(video_FHWC))]
    gap = np.full((video_FHWC.shape[1], BETWEEN, 3), PAPER, np.uint8)
    parts = [part for frame in shown for part in (gap, frame)]
    return np.concatenate(parts[1:], axis=1)


def drawn_clip(clip: Clip) -> np.ndarray:
    """The waveform, from −1 to 1, above the spectrogram, from 0 to half the sampling rate.

    All channels are mixed. uint8 (224, 384, 3); colours span 100 dB in every clip.
    """
    import matplotlib
    from PIL import Image
    from scipy.signal import stft

    mixed_N = clip.samples_CN.mean(0, dtype=np.float64)
    wave: np.ndarray = np.full((WAVE, WIDTH, 3), PAPER, np.uint8)
    edges = np.linspace(0, len(mixed_N), WIDTH + 1).astype(int)
    for column, (start, end) in enumerate(itertools.pairwise(edges)):
        part = np.clip(mixed_N[start : max(end, start + 1)], -1, 1)
        low, high = ((1 - one) * (WAVE - 1) / 2 for one in (part.max(), part.min()))
        wave[round(low) : round(high) + 1, column] = INK
    points = min(512, len(mixed_N))
    _, _, found = stft(mixed_N, nperseg=points, noverlap=points // 2)
    level = 1 + 20 * np.log10(np.maximum(2 * np.abs(found), 1e-12)) / DECIBELS
    colours = matplotlib.colormaps["magma"](np.clip(level, 0, 1)[::-1], bytes=True)[..., :3]
    spectrum = Image.fromarray(np.ascontiguousarray(colours)).resize((WIDTH, SPECTRUM), 0)
    return np.concatenate([wave, np.asarray(spectrum)])


def what_is_shown(shown: int, total: int, path: Path) -> str:
    """What a grid shows of outputs that are not images: "8 of 32 videos, 5 of 81 frames each"."""
    kind: Kind = kind_of_file(path)
    if kind == "image":
        return ""
    words = f"{shown} of {total} {UNITS[kind]}"
    if kind == "audio":
        top = read_clip(path).rate / 2
        return f"{words}: waveform (-1 to 1) above spectrogram (0 to {top:g} Hz)"
    frames = len(read_video(path))
    some = len(shown_frames(frames))
    return f"{words}, {some} {'' if some == frames else f'of {frames} '}frames each"
