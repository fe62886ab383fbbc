"""Videos for metrics: each value is the mean over the frames of one video.

A metric of images reads the frames in batches that never cross a video, so that a video's value
does not depend on the others of its set; `per_item` takes the means afterwards.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.reading import (
    VideoShape,
    one_colour,
    read_batches,
    read_video,
    video_shape,
)
from loraq.metrics.common.result import mean
from loraq.utils.kinds import Kind

if TYPE_CHECKING:
    import torch

THREADS = 2
"""That read at once, at most: a video has the memory of many images."""


class VideoSet(ImageSet):
    """Animated PNG files in the order of their prompts."""

    KIND: ClassVar[Kind] = "video"
    PART = 4

    @cached_property
    def shapes(self) -> tuple[VideoShape, ...]:
        """The shape of every video, from the files' headers."""
        return tuple(map(video_shape, self.paths))

    def sizes(self, workers: int = 0) -> set[tuple[int, int]]:
        """The sizes (height, width) of the videos; LoraqError for one that cannot be read."""
        return {(shape.height, shape.width) for shape in self.shapes}

    def one_colour(self, workers: int = 0) -> list[str]:
        """The names of the videos that show one colour, the same in all frames."""
        flags = [bool(one_colour(frames)) for frames in self._videos(workers)]
        return [name for name, flag in zip(self.names, flags, strict=True) if flag]

    def about(self) -> dict[str, Any]:
        """What a record says of the videos: frames and frames per second, seconds of them all."""
        frames = [shape.frames for shape in self.shapes]
        rates = {shape.fps for shape in self.shapes}
        found = {"kind": self.KIND, "frames": _only(set(frames)), "fps": _only(rates)}
        seconds = [s.frames / s.fps for s in self.shapes if s.fps]
        return found | {"seconds": _only({round(one, 6) for one in seconds})}

    @property
    def area(self) -> int:
        """Pixels of a frame."""
        return self.shapes[0].height * self.shapes[0].width

    def at(self, place: int) -> Path:
        """The file of the frame at `place`, counted over all videos."""
        ends = list(itertools.accumulate(shape.frames for shape in self.shapes))
        return self.paths[bisect.bisect_right(ends, place)]

    def batches(self, size: int, workers: int = 0) -> Iterator[torch.Tensor]:
        """Batches of uint8 (B, 3, H, W) frames in order, each of one video."""
        import torch

        for frames in self._videos(workers):
            for start in range(0, len(frames), size):
                part = torch.from_numpy(frames[start : start + size])
                yield part.permute(0, 3, 1, 2).contiguous()

    def check_paired(self, reference: ImageSet) -> None:
        """LoraqError if a video has another number of frames than its reference."""
        assert isinstance(reference, VideoSet)
        for path, own, other in zip(self.paths, self.shapes, reference.shapes, strict=True):
            if own.frames != other.frames:
                raise LoraqError(
                    f"{path} has {own.frames} frames, its reference {other.frames}: videos are "
                    "compared frame by frame. Make both with the same number"
                )

    def per_item(self, values: Sequence[float]) -> list[float]:
        """The mean over the frames of each video; `values`: of all frames in order."""
        left = iter(values)
        return [mean(list(itertools.islice(left, shape.frames))) for shape in self.shapes]

    def _videos(self, workers: int) -> Iterator[np.ndarray]:
        threads = min(workers or THREADS, THREADS)
        for batch in read_batches(self.paths, 1, threads, read_one=read_video):
            yield batch[0]


def _only(found: set[Any]) -> Any:
    """The only value of a set; None for several, or none."""
    return next(iter(found)) if len(found) == 1 else None
