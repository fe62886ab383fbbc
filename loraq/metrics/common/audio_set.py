"""Clips of sound for metrics: WAV files, read as float samples.

Shapes: C channels, N samples.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.reading import read_batches
from loraq.utils.kinds import Kind


@dataclass(frozen=True)
class Clip:
    """Sound: `samples_CN` in −1…1 as float32, `rate` samples per second."""

    samples_CN: np.ndarray
    rate: int

    def __repr__(self) -> str:
        channels, samples = self.samples_CN.shape
        return f"Clip({samples / self.rate:.2f} s, {channels} channels, {self.rate} Hz)"


def read_clip(path: Path) -> Clip:
    """A WAV file of float or integer samples; LoraqError if it cannot be read, has none, or NaN."""
    from scipy.io import wavfile

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", wavfile.WavFileWarning)  # chunks that it does not know
            rate, data = wavfile.read(path)
    except FileNotFoundError:
        raise LoraqError(f"clip {path} does not exist; run `loraq generate`") from None
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        raise LoraqError(
            f"cannot read the clip {path}: {error}. Restore it; clips of a run are made again by "
            "`loraq generate`"
        ) from error
    if not len(data) or not rate:
        raise LoraqError(f"{path} has no samples. Restore it, or leave it out")
    if bad := int((~np.isfinite(data)).sum()):  # an SNR of NaN would count as its cap
        raise LoraqError(
            f"{path}: {bad} of {data.size} samples are NaN or infinite. Look at the model that "
            "made it; clips of a run are made again by `loraq generate`"
        )
    samples_NC = data.reshape(len(data), -1)
    if data.dtype == np.uint8:
        samples_NC = (samples_NC.astype(np.float32) - 128) / 128
    elif data.dtype.kind == "i":
        samples_NC = samples_NC / -float(np.iinfo(data.dtype).min)
    return Clip(np.ascontiguousarray(samples_NC.T, np.float32), int(rate))


class AudioSet(ImageSet):
    """WAV files in the order of their prompts."""

    KIND: ClassVar[Kind] = "audio"
    PART = 16

    def clips(self, workers: int = 0) -> Iterator[Clip]:
        """The clips in order, read in `workers` threads."""
        for batch in read_batches(self.paths, 1, workers, read_one=read_clip):
            yield batch[0]

    def sizes(self, workers: int = 0) -> set[tuple[int, int]]:
        """The sizes (samples, channels) of the clips; LoraqError for one that cannot be read."""
        return {clip.samples_CN.shape[::-1] for clip in self.clips(workers)}

    def one_colour(self, workers: int = 0) -> list[str]:
        """The names of the silent clips: all samples of a channel are equal."""
        flags = [is_silent(clip.samples_CN) for clip in self.clips(workers)]
        return [name for name, flag in zip(self.names, flags, strict=True) if flag]

    def about(self) -> dict[str, Any]:
        """What a record says of the clips: samples per second, channels, seconds of one clip."""
        clip = read_clip(self.paths[0])
        channels, samples = clip.samples_CN.shape
        found = {"kind": self.KIND, "rate": clip.rate, "channels": channels}
        return found | {"seconds": round(samples / clip.rate, 6)}

    @property
    def area(self) -> int:
        """Clips are compared one by one, whatever their length."""
        return 1


def is_silent(samples_CN: np.ndarray) -> bool:
    """Whether every channel has one value only."""
    return bool((samples_CN == samples_CN[:, :1]).all())


def paired_clips(
    images: ImageSet, reference: ImageSet, workers: int, shortest: int = 1
) -> Iterator[tuple[Clip, Clip]]:
    """Clips and their references, of equal sampling rate, length and number of channels.

    shortest: minimum number of samples.
    """
    assert isinstance(images, AudioSet)
    assert isinstance(reference, AudioSet)
    pairs = zip(images.clips(workers), reference.clips(workers), strict=True)
    for path, (own, other) in zip(images.paths, pairs, strict=True):
        if (own.rate, own.samples_CN.shape) != (other.rate, other.samples_CN.shape):
            raise LoraqError(
                f"{path} is {own}, its reference {other}: clips are compared sample by sample. "
                "Make both with the same rate and length"
            )
        if own.samples_CN.shape[-1] < shortest:
            raise LoraqError(
                f"{path} has {own.samples_CN.shape[-1]} samples; this metric needs {shortest} or "
                "more. Make longer clips, or leave the metric out of metrics.names"
            )
        yield own, other
