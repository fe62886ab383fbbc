"""Images of several rows for each prompt, embedded in the page as data URIs."""

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
from loraq.utils.manifest import check_product

PROMPTS = 24
SIDE = 384  # pixels; larger images are downsampled
BUDGET = 9_000_000  # bytes of all images; further prompts are left out


@dataclass(frozen=True)
class Shown:
    """One image of a row: data URIs of the image and its difference to the first row's image.

    note: the image's PSNR. size: (width, height) in pixels.
    """

    label: str
    image: str
    difference: str | None
    note: str
    size: tuple[int, int]

    def __repr__(self) -> str:
        width, height = self.size
        return f"Shown({self.label!r}, {width} × {height} px)"


@dataclass(frozen=True)
class Gallery:
    """Prompts as (name, text, images of the rows); `left_out` prompts exceeded the limits."""

    prompts: list[tuple[str, str, list[Shown]]]
    left_out: int
    gain: int = DIFFERENCE_GAIN

    def __repr__(self) -> str:
        return f"Gallery({len(self.prompts)} prompts, {self.left_out} left out)"


def make_gallery(columns: Sequence[tuple[Record, Path]]) -> Gallery:
    """Build a gallery of the first prompts from (record, folder of its images) of each row.

    Differences are to the first row. LoraqError if a row lacks an image, or if one does not match
    the manifest of its folder.
    """
    names, texts = list(columns[0][0].images["names"]), _texts(columns[0][0])
    for _, folder in columns:
        check_product(folder, [f"{name}.png" for name in names[:PROMPTS]])
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
    path, gap = folder / f"{name}.png", None
    pixels = read_image(path)
    if record is not first[0]:
        gap = _encoded(difference(pixels, read_image(first[1] / f"{name}.png"), path))
    values = record.metrics.get("psnr", {}).get("per_image")
    note = "" if not values else f"{values[place]:.1f} dB"
    return Shown(record.label or record.row, _encoded(pixels), gap, note, pixels.shape[1::-1])


def _texts(record: Record) -> dict[str, str]:
    """Return name → prompt text; empty if the prompt file no longer exists."""
    try:
        found = data_prompts(from_plain(DataConfig, record.config["data"]))
    except LoraqError:
        return {}
    return {prompt.name: prompt.prompt for prompt in found}


def _encoded(pixels: np.ndarray) -> str:
    """Encode small images losslessly, large ones downsampled and compressed."""
    from PIL import Image

    image, stream = Image.fromarray(pixels), io.BytesIO()
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(stream, "WEBP", quality=85)
    else:
        image.save(stream, "WEBP", lossless=True)
    return data_uri(stream.getvalue(), "webp")


def data_uri(data: bytes, kind: str) -> str:
    """Return image data of the MIME type image/`kind` as a data URI."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
