"""Read images and videos in order, in `metrics.workers` threads ahead of the computation.

The threads only read and resize, so that results do not depend on their number; decoding and
resizing do not hold Python's lock. At most two batches are in memory, or one image per thread more.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError
from loraq.utils.hashing import cached_hash
from loraq.utils.kinds import BLANK, Kind

log = logging.getLogger(__name__)
Transform = Callable[[np.ndarray], np.ndarray]
MOST_THREADS = 8
"""Of one process if `metrics.workers` is 0; a machine with many GPUs runs a process for each."""


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 (H, W, 3); LoraqError for another mode, a video or an unreadable file."""
    with _opened(path) as image:
        if getattr(image, "n_frames", 1) > 1:
            raise LoraqError(
                f"{path} is a video of {image.n_frames} frames, and an image is expected. Compare "
                "videos with videos (metrics=video), or keep one frame"
            )
        image.load()
        mode, pixels = image.mode, np.array(image)
    return _checked(pixels, mode, path)


def read_video(path: Path) -> np.ndarray:
    """All frames of an animated PNG as uint8 (F, H, W, 3); LoraqError as `read_image`."""
    from PIL import ImageSequence

    with _opened(path) as video:
        frames = [(frame.mode, np.array(frame)) for frame in ImageSequence.Iterator(video)]
    return np.stack([_checked(pixels, mode, path) for mode, pixels in frames])


@dataclass(frozen=True)
class VideoShape:
    """Frames, height and width of a video, and its frames per second (None for one frame)."""

    frames: int
    height: int
    width: int
    fps: float | None


def video_shape(path: Path) -> VideoShape:
    """The shape of an animated PNG, from its header; LoraqError for an unreadable file."""
    with _opened(path) as video:
        frames, milliseconds = getattr(video, "n_frames", 1), video.info.get("duration")
        fps = None
        if milliseconds:  # the file holds a fraction, PIL a float
            fps = float(1 / Fraction(milliseconds / 1000).limit_denominator(65535))
        return VideoShape(frames, video.height, video.width, fps)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            yield image
    except FileNotFoundError:
        raise _missing(path) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise LoraqError(
            f"cannot read the image {path}: {error}. Restore it; images of a run are made again "
            "by `loraq generate`"
        ) from error


def _checked(pixels: np.ndarray, mode: str, path: Path) -> np.ndarray:
    if mode != "RGB" or pixels.dtype != np.uint8:
        raise LoraqError(
            f"{path} is {mode} ({pixels.dtype}); metrics read 8-bit RGB: convert it first"
        )
    return pixels


def image_size(pixels: np.ndarray) -> np.ndarray:
    """Height and width of an image."""
    return np.array(pixels.shape[:2])


def one_colour(pixels: np.ndarray) -> np.ndarray:
    """Whether all pixels of an image, or of all frames of a video, are equal (no dimensions)."""
    return (pixels == pixels[..., :1, :1, :][:1]).all()


def warn_one_colour(
    names: Sequence[str], total: int, what: str = "images", kind: Kind = "image"
) -> None:
    """Log a warning that names the images of one colour, or silent clips; nothing without any."""
    if names:
        log.warning(
            "%d of %d %s %s (%s): the model or its decoder has probably failed, "
            "and their scores mean nothing. Look at them.",
            *(len(names), total, what, BLANK[kind], ", ".join(names)),
        )


def image_hash(path: Path) -> str:
    """sha256 of an image file; LoraqError if it does not exist."""
    try:
        return cached_hash(path)
    except FileNotFoundError:
        raise _missing(path) from None


def _missing(path: Path) -> LoraqError:
    return LoraqError(f"image {path} does not exist; run `loraq generate`")


def read_batches(
    paths: Sequence[Path],
    size: int,
    workers: int,
    transform: Transform | None = None,
    read_one: Callable[[Path], Any] = read_image,
) -> Iterator[list[Any]]:
    """Lists of `size` images (uint8, or what `transform` returns) in the order of `paths`.

    read_one: reads a file. LoraqError for one that cannot be read, when its turn comes.
    """

    def read(path: Path) -> Any:
        found = read_one(path)
        return found if transform is None else transform(found)

    threads = workers or min(MOST_THREADS, os.cpu_count() or 1)
    left, batch = iter(paths), list[Any]()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
    try:
        ahead = (pool.submit(read, path) for path in left)
        waiting = deque(itertools.islice(ahead, size + threads))
        while waiting:
            batch.append(waiting.popleft().result())
            waiting.extend(itertools.islice(ahead, 1))
            if len(batch) == size or not waiting:
                yield batch
                batch = []
    finally:
        pool.shutdown(cancel_futures=True)
