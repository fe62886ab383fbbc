"""Image sets for metrics: image files in the order of their prompts, with cached features.

Images are uint8, RGB, channels first; other image modes raise LoraqError.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.reading import (
    image_hash,
    image_size,
    one_colour,
    read_batches,
    read_image,
)
from loraq.metrics.common.result import Options
from loraq.utils.kinds import UNITS, Kind

if TYPE_CHECKING:
    import torch


SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "image": (".png", ".jpg", ".jpeg", ".webp", ".bmp"),
    "video": (".png",),
    "audio": (".wav",),
}
"""Of the files in a folder, in lower or upper case."""
PIXELS = {"cpu": 1 << 20}
"""Limit of pixels per batch of compared images; SSIM needs about 1 GB for as many."""
PIXELS_ON_GPU = 1 << 22


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Image files with names, optionally prompts and `seen` (in the training data or not).

    Videos and clips have sets of their own kind (`kinds.py`).

    `features` maps an extractor's name to the features of these images. `features_of` fills it, so
    that Fréchet distance, KID and alignment compute features once.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    prompts: tuple[str, ...] | None = None
    seen: tuple[bool, ...] | None = None
    features: dict[str, Any] = field(default_factory=dict, repr=False)
    KIND: ClassVar[Kind] = "image"
    PART: ClassVar[int] = 64
    """Images of a part that processes share, at least: claims and files cost little beside them."""

    def __repr__(self) -> str:
        where = self.paths[0].parent
        return f"{type(self).__name__}({len(self)} {UNITS[self.KIND]} in '{where}')"

    def __post_init__(self) -> None:
        if not self.paths:
            raise LoraqError("an image set needs at least one image")
        for what in ("names", "prompts", "seen"):
            given = getattr(self, what)
            if given is not None and len(given) != len(self.paths):
                raise LoraqError(f"{len(self.paths)} images but {len(given)} {what}")
        check_unique(self.names)

    @classmethod
    def of_prompts(cls, paths: Sequence[Path], prompts: Sequence[Any]) -> ImageSet:
        """Images of `prompts` (objects with name, prompt, seen), in the same order."""
        return cls(
            paths=tuple(map(Path, paths)),
            names=tuple(prompt.name for prompt in prompts),
            prompts=tuple(prompt.prompt for prompt in prompts),
            seen=tuple(bool(prompt.seen) for prompt in prompts),
        )

    @classmethod
    def of_folder(cls, folder: Path, names: Sequence[str]) -> ImageSet:
        """The files NAME.png (or another of `SUFFIXES`) of a folder, in the order of `names`.

        LoraqError if a name has no file, or several.
        """
        found: dict[str, list[Path]] = {}
        for path in sorted(Path(folder).iterdir()):
            if path.suffix.lower() in SUFFIXES[cls.KIND]:
                found.setdefault(path.stem, []).append(path)
        if missing := [name for name in names if name not in found]:
            kinds, unit = SUFFIXES[cls.KIND], UNITS[cls.KIND]
            raise LoraqError(
                f"{len(missing)} of {len(names)} {unit} are missing in '{folder}', which has "
                f"{len(found)} ({', '.join(kinds)}){_other_files(folder, missing)}; the first is "
                f"'{missing[0]}{kinds[0]}'. Name the {unit} after the prompts, or select others "
                "(data.count=, data.split=)."
            )
        if double := [name for name in names if len(found[name]) > 1]:
            files = " and ".join(path.name for path in found[double[0]])
            raise LoraqError(
                f"'{folder}' has several images of {len(double)} names, such as {files}. Keep the "
                "one that is meant there, and move the others elsewhere."
            )
        return cls(tuple(found[name][0] for name in names), tuple(names))

    def __len__(self) -> int:
        return len(self.paths)

    @cached_property
    def hash(self) -> str:
        """sha256 over names and file contents in order; identifies the image set in a record."""
        digest = hashlib.sha256()
        for name, path in zip(self.names, self.paths, strict=True):
            digest.update(f"{name}\0".encode())
            digest.update(bytes.fromhex(image_hash(path)))
        return digest.hexdigest()

    def sizes(self, workers: int = 0) -> set[tuple[int, int]]:
        """The sizes (height, width) of the images; LoraqError for one that cannot be read."""
        batches = read_batches(self.paths, 16, workers, image_size)
        return {(int(side[0]), int(side[1])) for batch in batches for side in batch}

    def one_colour(self, workers: int = 0) -> list[str]:
        """The names of the images whose pixels are all equal."""
        batches = read_batches(self.paths, 16, workers, one_colour)
        flags = [bool(flag) for batch in batches for flag in batch]
        return [name for name, flag in zip(self.names, flags, strict=True) if flag]

    def subset(self, places: Sequence[int]) -> ImageSet:
        """The images at `places`, with their cached features."""

        def pick(values: tuple) -> tuple:
            return tuple(values[place] for place in places)

        return type(self)(
            paths=pick(self.paths),
            names=pick(self.names),
            prompts=None if self.prompts is None else pick(self.prompts),
            seen=None if self.seen is None else pick(self.seen),
            features={name: found.subset(places) for name, found in self.features.items()},
        )

    def of_names(self, names: Sequence[str]) -> ImageSet:
        """The images with these names, in this order; LoraqError if one is missing."""
        return self.subset(places_of(names, self.names))

    def read(self, place: int) -> np.ndarray:
        """One image as uint8 (H, W, 3)."""
        return read_image(self.paths[place])

    @property
    def area(self) -> int:
        """Pixels of an image."""
        return int(self.read(0)[..., 0].size)

    def at(self, place: int) -> Path:
        """The file of the value at `place` that a metric computes."""
        return self.paths[place]

    def check_paired(self, reference: ImageSet) -> None:
        """LoraqError if the images cannot be compared with the reference one by one."""

    def per_item(self, values: Sequence[float]) -> list[float]:
        """The value of each image, from those that a metric computes."""
        return list(values)

    def about(self) -> dict[str, Any]:
        """What a record says of a set that is not of images."""
        return {}

    def batches(self, size: int, workers: int = 0) -> Iterator[torch.Tensor]:
        """Batches of uint8 (B, 3, H, W) in order; LoraqError for images of different sizes."""
        import torch

        if size < 1:
            raise LoraqError(f"batch_size = {size}; it must be at least 1")
        for number, images in enumerate(read_batches(self.paths, size, workers)):
            shapes = {image.shape for image in images}
            if len(shapes) > 1:
                raise LoraqError(
                    f"images of different sizes in one set: {sorted(shapes)} "
                    f"({self.paths[number * size]} …); metrics compare images of one size"
                )
            yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _other_files(folder: Path, names: Sequence[str]) -> str:
    """' and 3 of these names as .tiff', of files that have a name and another suffix; or ''."""
    wanted = set(names)
    others = Counter(path.suffix for path in Path(folder).iterdir() if path.stem in wanted)
    listed = ", ".join(f"{count} as {suffix or 'no suffix'}" for suffix, count in others.items())
    return f" and, of these names, {listed}, which is not read" if listed else ""


def check_unique(names: Sequence[str]) -> None:
    """LoraqError if a name comes twice."""
    counted = Counter(names)
    if twice := sorted(name for name, count in counted.items() if count > 1):
        raise LoraqError(f"image names must be unique; these come twice: {twice[:5]}")


def places_of(wanted: Sequence[str], names: Sequence[str]) -> list[int]:
    """The places of the wanted names; LoraqError if one is missing."""
    place = {name: number for number, name in enumerate(names)}
    if missing := [name for name in wanted if name not in place]:
        raise LoraqError(
            f"{len(missing)} of {len(wanted)} prompts have no image in the set of {len(names)} to "
            f"compare with ({missing[:3]} …). Images are compared with those of the same prompts: "
            "make both from one list, or leave these metrics out of metrics.names"
        )
    return [place[name] for name in wanted]


def compared_batch(options: Options, area: int) -> int:
    """How many images of `area` pixels are compared at once."""
    return min(options.batch_size, max(1, PIXELS.get(options.device, PIXELS_ON_GPU) // area))


def paired_batches(
    images: ImageSet, reference: ImageSet, options: Options, smallest: int = 1
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of two sets with the same names in the same order and images of equal size.

    smallest: minimum side in pixels.
    """
    if images.names != reference.names:
        only = sorted(set(images.names) ^ set(reference.names))[:5]
        detail = f"not in both: {only}" if only else "the order differs"
        raise LoraqError(
            f"the images ({len(images)}) and the reference images ({len(reference)}) are not of "
            f"the same prompts in the same order; {detail}"
        )
    images.check_paired(reference)
    size, done = compared_batch(options, images.area), 0
    read = [part.batches(size, options.workers) for part in (images, reference)]
    pairs = zip(*read, strict=True)
    for own, other in pairs:
        if own.shape != other.shape:
            raise LoraqError(
                f"{images.at(done)} is {tuple(own.shape[-2:])}, its reference "
                f"{tuple(other.shape[-2:])}: images are compared at one size"
            )
        if min(own.shape[-2:]) < smallest:
            raise LoraqError(
                f"images of {tuple(own.shape[-2:])} are too small; this metric needs at least "
                f"{smallest} pixels a side"
            )
        yield own, other
        done += len(own)
