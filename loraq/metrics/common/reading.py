"""Read image files in order, in `metrics.workers` worker processes.

Workers only read and resize, so that results do not depend on their number. At most a few batches
are in memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from loraq.errors import LoraqError
from loraq.utils.hashing import cached_hash

log = logging.getLogger(__name__)
Transform = Callable[[np.ndarray], np.ndarray]


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


class ImageFiles:
    """A torch dataset: reads image files and applies `transform`; errors are returned."""

    def __init__(self, paths: Sequence[Path], transform: Transform | None) -> None:
        self.paths, self.transform = tuple(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> np.ndarray | LoraqError:
        try:
            pixels = read_image(self.paths[place])
            return pixels if self.transform is None else self.transform(pixels)
        except LoraqError as error:  # raised by `read_batches`, without a worker's traceback
            return error


def read_batches(
    paths: Sequence[Path], size: int, workers: int, transform: Transform | None = None
) -> Iterator[list[np.ndarray]]:
    """Lists of `size` images (uint8, or what `transform` returns) in the order of `paths`."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        ImageFiles(paths, transform),
        batch_size=size,
        num_workers=workers,
        collate_fn=list,
        multiprocessing_context="spawn" if workers else None,
    )
    for batch in loader:
        for image in batch:
            if isinstance(image, LoraqError):
                raise image
        yield batch
