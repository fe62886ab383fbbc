"""Read image files in order, in `metrics.workers` threads ahead of what is computed from them.

The threads only read and resize, so that results do not depend on their number; decoding and
resizing do not hold Python's lock. At most two batches are in memory, or one image per thread more.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from loraq.errors import LoraqError
from loraq.utils.hashing import cached_hash

log = logging.getLogger(__name__)
Transform = Callable[[np.ndarray], np.ndarray]
MOST_THREADS = 8
"""Of one process if `metrics.workers` is 0; a machine with many GPUs runs a process for each."""


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 (H, W, 3); LoraqError for another image mode or an unreadable file."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            image.load()
            mode, pixels = image.mode, np.array(image)
    except FileNotFoundError:
        raise _missing(path) from None
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise LoraqError(
            f"cannot read the image {path}: {error}. Restore it; images of a run are made again "
            "by `loraq generate`"
        ) from error
    if mode != "RGB" or pixels.dtype != np.uint8:
        raise LoraqError(
            f"{path} is {mode} ({pixels.dtype}); metrics read 8-bit RGB: convert it first"
        )
    return pixels


def image_size(pixels: np.ndarray) -> np.ndarray:
    """Height and width of an image."""
    return np.array(pixels.shape[:2])


def one_colour(pixels: np.ndarray) -> np.ndarray:
    """Whether all pixels of an image are equal, as an array without dimensions."""
    return (pixels == pixels[:1, :1]).all()


def warn_one_colour(names: Sequence[str], total: int, what: str = "images") -> None:
    """Log a warning that names the images of one colour only; nothing without any."""
    if names:
        log.warning(
            "%d of %d %s have one colour only (%s): the model or its decoder has probably failed, "
            "and their scores mean nothing. Look at them.",
            *(len(names), total, what, ", ".join(names)),
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
    paths: Sequence[Path], size: int, workers: int, transform: Transform | None = None
) -> Iterator[list[np.ndarray]]:
    """Lists of `size` images (uint8, or what `transform` returns) in the order of `paths`.

    LoraqError for one that cannot be read, when its turn comes.
    """

    def read(path: Path) -> np.ndarray:
        pixels = read_image(path)
        return pixels if transform is None else transform(pixels)

    threads = workers or min(MOST_THREADS, os.cpu_count() or 1)
    left, batch = iter(paths), list[np.ndarray]()
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
