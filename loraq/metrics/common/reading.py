"""Image files read in order, by worker processes where `metrics.workers` asks for them.

Workers only read, and resize where a network wants one size: what they give does not depend on how
many they are. Memory holds a few batches, however many images there are.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from loraq.errors import LoraqError

Transform = Callable[[np.ndarray], np.ndarray]


def read_image(path: Path) -> np.ndarray:
    """One image as uint8 (H, W, 3); whatever else a file holds is refused, not converted."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(read_bytes(path))) as image:
            image.load()
            mode, pixels = image.mode, np.array(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise LoraqError(
            f"cannot read the image {path}: {error}; delete it and run again to make it anew"
        ) from error
    if mode != "RGB" or pixels.dtype != np.uint8:
        raise LoraqError(
            f"{path} is {mode} ({pixels.dtype}); metrics read 8-bit RGB: convert it first"
        )
    return pixels


def read_bytes(path: Path) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise LoraqError(f"there is no image {path}; run `loraq generate` to make it") from error


class Files:
    """What a worker is given: paths, and what is done with each image."""

    def __init__(self, paths: Sequence[Path], transform: Transform | None) -> None:
        self.paths, self.transform = tuple(paths), transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> np.ndarray | LoraqError:
        try:
            pixels = read_image(self.paths[place])
            return pixels if self.transform is None else self.transform(pixels)
        except LoraqError as error:  # told by the process that asked, without a worker's traceback
            return error


def read_batches(
    paths: Sequence[Path], size: int, workers: int, transform: Transform | None = None
) -> Iterator[list[np.ndarray]]:
    """Lists of `size` images in the order of `paths`."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        Files(paths, transform),  # type: ignore[arg-type]
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
