"""Outputs of several rows for each prompt, embedded in the page as data URIs.

A video is a strip of frames and a moving picture, a clip of sound a drawing and a player.
"""

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
from loraq.metrics.common.audio_set import read_clip
from loraq.metrics.common.reading import read_image, read_video, video_shape
from loraq.results.plots.grid import DIFFERENCE_GAIN, difference
from loraq.results.plots.still import still, what_is_shown
from loraq.results.record import Record
from loraq.results.tables.columns import kind_of, summary_metrics
from loraq.utils.kinds import SUFFIXES, Kind
from loraq.utils.manifest import check_product

PROMPTS = 24
SIDE = 384  # pixels; larger images are downsampled
STRIP, MOVING = 640, 192  # pixels of a strip of frames or a drawn clip, and of a moving picture
SECONDS = 5.0  # of a clip of sound, at most
BUDGET = 9_000_000  # bytes of all images; further prompts are left out


@dataclass(frozen=True)
class Shown:
    """One output of a row: data URIs of its picture and the difference to the first row's picture.

    note: the output's PSNR or SNR. size: (width, height) in pixels. moving: a video that plays;
    sound: a clip that can be played.
    """

    label: str
    image: str
    difference: str | None
    note: str
    size: tuple[int, int]
    moving: str | None = None
    sound: str | None = None

    def parts(self) -> list[str]:
        """The data URIs."""
        return [part for part in (self.image, self.difference, self.moving, self.sound) if part]

    def __repr__(self) -> str:
        width, height = self.size
        return f"Shown({self.label!r}, {width} × {height} px)"


@dataclass(frozen=True)
class Gallery:
    """Prompts as (name, text, images of the rows); `left_out` prompts exceeded the limits.

    shows: what the pictures show of videos or clips.
    """

    prompts: list[tuple[str, str, list[Shown]]]
    left_out: int
    gain: int = DIFFERENCE_GAIN
    shows: str = ""

    def __repr__(self) -> str:
        return f"Gallery({len(self.prompts)} prompts, {self.left_out} left out)"


def make_gallery(columns: Sequence[tuple[Record, Path]]) -> Gallery:
    """Build a gallery of the first prompts from (record, folder of its images) of each row.

    Differences are to the first row. LoraqError if a row lacks an image, or if one does not match
    the manifest of its folder.
    """
    suffix = SUFFIXES[kind_of(columns[0][0])]
    names, texts = list(columns[0][0].images["names"]), _texts(columns[0][0])
    for _, folder in columns:
        check_product(folder, [f"{name}{suffix}" for name in names[:PROMPTS]])
    made: list[tuple[str, str, list[Shown]]] = []
    size = 0
    for place, name in enumerate(names[:PROMPTS]):
        entry = [_shown(record, folder, name, place, columns[0]) for record, folder in columns]
        size += sum(len(part) for shown in entry for part in shown.parts())
        if made and size > BUDGET:
            break
        made.append((name, texts.get(name, name.replace("_", " ")), entry))
    shows = what_is_shown(len(made), len(names), columns[0][1] / f"{names[0]}{suffix}")
    if suffix == ".wav":
        shows += f". The page plays the first {SECONDS:g} s in 16 bits"
    return Gallery(made, len(names) - len(made), shows=shows)


def _shown(
    record: Record, folder: Path, name: str, place: int, first: tuple[Record, Path]
) -> Shown:
    kind, gap = kind_of(record), None
    path, other = (place / f"{name}{SUFFIXES[kind]}" for place in (folder, first[1]))
    pixels = _picture(path, kind)
    if record is not first[0] and kind != "audio":  # a difference of drawings says nothing
        gap = _encoded(difference(pixels, _picture(other, kind), path), kind)
    values = record.metrics.get(summary_metrics([record])[0], {}).get("per_image")
    note = "" if not values else f"{values[place]:.1f} dB"
    return Shown(
        record.label or record.row,
        _encoded(pixels, kind),
        gap,
        note,
        pixels.shape[1::-1],
        _moving(path) if kind == "video" else None,
        _sound(path) if kind == "audio" else None,
    )


def _picture(path: Path, kind: Kind) -> np.ndarray:
    return read_image(path) if kind == "image" else np.asarray(still(path))


def _moving(path: Path) -> str:
    """A video that repeats, downsampled and compressed."""
    from PIL import Image

    frames = [Image.fromarray(frame) for frame in read_video(path)]
    for frame in frames:
        frame.thumbnail((MOVING, MOVING), Image.Resampling.LANCZOS)
    rate, stream = video_shape(path).fps, io.BytesIO()
    settings = {"quality": 80, "duration": round(1000 / rate) if rate else 1000, "loop": 0}
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:], **settings)
    return data_uri(stream.getvalue(), "image/webp")


def _sound(path: Path) -> str:
    """The start of a clip in 16 bits."""
    from scipy.io import wavfile

    clip, stream = read_clip(path), io.BytesIO()
    samples_CN = np.clip(clip.samples_CN[:, : round(SECONDS * clip.rate)], -1, 1)
    wavfile.write(stream, clip.rate, np.round(32767 * samples_CN.T).astype(np.int16))
    return data_uri(stream.getvalue(), "audio/wav")


def _texts(record: Record) -> dict[str, str]:
    """Return name → prompt text; empty if the prompt file no longer exists."""
    try:
        found = data_prompts(from_plain(DataConfig, record.config["data"]))
    except LoraqError:
        return {}
    return {prompt.name: prompt.prompt for prompt in found}


def _encoded(pixels: np.ndarray, kind: Kind = "image") -> str:
    """Encode small images losslessly, large ones downsampled and compressed."""
    from PIL import Image

    image, stream = Image.fromarray(pixels), io.BytesIO()
    side = SIDE if kind == "image" else STRIP
    if max(image.size) > side:
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.save(stream, "WEBP", quality=85)
    else:
        image.save(stream, "WEBP", lossless=True)
    return data_uri(stream.getvalue(), "image/webp")


def data_uri(data: bytes, kind: str) -> str:
    """Return data of the MIME type `kind` as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
