"""Images of several rows side by side, prompt by prompt, as data that a page carries in itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraq.config import DataConfig
from loraq.config.convert import from_plain
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.metrics.common.reading import read_image
from loraq.results.plots.grid import DIFFERENCE_GAIN, difference
from loraq.results.record import Record

PROMPTS = 24
SIDE = 384  # larger images are shown at this size
BUDGET = 9_000_000  # bytes of all images; fewer prompts where it is not enough


@dataclass(frozen=True)
class Shown:
    """One image of one row, and how far it is from the first row's; size: (width, height)."""

    label: str
    image: str
    difference: str | None
    note: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Gallery:
    """For every prompt its text and the images of the rows; `left_out` prompts did not fit."""

    prompts: list[tuple[str, str, list[Shown]]]
    left_out: int
    gain: int = DIFFERENCE_GAIN


def gallery(columns: Sequence[tuple[Record, Path]]) -> Gallery:
    """The first prompts of rows with their images' folders; the first row is what others are
    compared with. Prompts whose picture a row lacks are an error."""
    names, texts = list(columns[0][0].images["names"]), _texts(columns[0][0])
    made: list[tuple[str, str, list[Shown]]] = []
    size = 0
    for place, name in enumerate(names[:PROMPTS]):
        entry = [_shown(record, folder, name, place, columns[0]) for record, folder in columns]
        size += sum(len(shown.image) + len(shown.difference or "") for shown in entry)
        if made and size > BUDGET:
            break
        made.append((name, texts.get(name, name.replace("_", " ")), entry))
    return Gallery(made, len(names) - len(made))


def _shown(
    record: Record, folder: Path, name: str, place: int, first: tuple[Record, Path]
) -> Shown:
    path, apart = folder / f"{name}.png", None
    pixels = read_image(path)
    if record is not first[0]:
        apart = _encoded(difference(pixels, read_image(first[1] / f"{name}.png"), path))
    values = record.metrics.get("psnr", {}).get("per_image")
    note = "" if not values else f"{values[place]:.1f} dB"
    return Shown(record.label or record.row, _encoded(pixels), apart, note, pixels.shape[1::-1])


def _texts(record: Record) -> dict[str, str]:
    """name → prompt, where the file of prompts is still there."""
    try:
        found = data_prompts(from_plain(DataConfig, record.config["data"]))
    except LoraqError:
        return {}
    return {prompt.name: prompt.prompt for prompt in found}


def _encoded(pixels: np.ndarray) -> str:
    """Small images without loss, large ones resampled and compressed."""
    from PIL import Image

    image, stream = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(stream, "WEBP", quality=85)
    else:
        image.save(stream, "WEBP", lossless=True)
    return picture(stream.getvalue(), "webp")


def picture(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
