"""Small real images: shapes on gradients, and damaged copies of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from loraq.metrics.common.image_set import ImageSet

NAMES = tuple(f"shape_{i}" for i in range(10))
SIDE = 64


def draw(number: int) -> np.ndarray:
    """A gradient with a few shapes: uint8 (64, 64, 3)."""
    generator = np.random.default_rng(number)
    ramp = np.linspace(60, 220, SIDE)
    channels = [ramp[:, None] + 0 * ramp, ramp[None, :] + 0 * ramp[:, None], np.full((64, 64), 128)]
    image = Image.fromarray(np.stack(channels, -1).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = generator.integers(2, 36, 4)
        colour = tuple(map(int, generator.integers(0, 256, 3)))
        shape = pen.ellipse if generator.random() < 0.5 else pen.rectangle
        shape((x, y, x + w, y + h), fill=colour)
    return np.asarray(image)


def write(folder: Path, arrays: dict[str, np.ndarray], **more) -> ImageSet:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        Image.fromarray(array).save(folder / f"{name}.png")
    made = ImageSet.of_folder(folder, tuple(arrays))
    return ImageSet(made.paths, made.names, **more)


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> ImageSet:
    return write(tmp_path_factory.mktemp("reference"), {n: draw(i) for i, n in enumerate(NAMES)})


@pytest.fixture(scope="session")
def noisy(tmp_path_factory) -> ImageSet:
    """The reference with noise that grows from image to image; every second caption was seen."""
    generator = np.random.default_rng(0)
    arrays = {}
    for i, name in enumerate(NAMES):
        damaged = draw(i) + generator.normal(0, 2 + 2 * i, (SIDE, SIDE, 3))
        arrays[name] = damaged.round().clip(0, 255).astype(np.uint8)
    return write(
        tmp_path_factory.mktemp("noisy"),
        arrays,
        prompts=tuple(f"a drawing of {name}" for name in NAMES),
        seen=tuple(i % 2 == 0 for i in range(len(NAMES))),
    )
