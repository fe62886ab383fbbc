"""Outputs of every row side by side: prompts × methods in one PNG.

A video is shown as a strip of frames, a clip of sound as waveform and spectrogram (`still.py`).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError
from loraq.metrics.common.kinds import kind_of_file
from loraq.results.plots.still import still
from loraq.utils.files import write_bytes

INK = (20, 20, 20)
FAINT = (110, 110, 110)
PAPER = (255, 255, 255)
GAP = 6
DIFFERENCE_GAIN = 4
LARGEST, WIDEST = 256, 480  # pixels of the longer side of an image, and of a strip or a drawn clip


def image_grid(
    labels: Sequence[str],
    images: Sequence[Sequence[Path]],
    prompts: Sequence[str],
    path: Path,
    *,
    notes: Sequence[str] = (),
    differences: bool = False,
    side: int | None = None,
    caption: str = "",
) -> Path:
    """Write a PNG of prompts (rows) × methods (columns) to `path`, with labels and prompts.

    images: image files, images[column][row].
    notes: text below each label, such as "31.2 dB".
    differences: adds |image − image of the first column| × 4 below each row, for the other columns.
    side: pixels of an image's longer side, by default its own size clamped to 96–256. Images are
        enlarged by integer factors without smoothing, or resampled.
    caption: what is shown, in the top left corner.

    LoraqError if the numbers of labels, images and prompts differ, or an image cannot be read.
    """
    from PIL import Image, ImageDraw

    if len(labels) != len(images) or not labels:
        raise LoraqError(f"{len(labels)} labels for {len(images)} columns of images")
    short = [len(column) for column in images if len(column) != len(prompts)]
    if short or not prompts:
        raise LoraqError(f"{len(prompts)} prompts, but a column has {short or 0} images")

    first_picture = still(images[0][0])
    drawn = kind_of_file(images[0][0]) != "image"
    side = side or _own_side(first_picture, WIDEST if drawn else LARGEST)
    tall = _sized(first_picture, side).size[1] if drawn else side  # images have square cells
    text, small = _font(15), _font(12)
    left = 170
    heads = [_wrapped(label, text, side) for label in labels]
    head_height = max(len(lines) for lines in heads) * 19 + (18 if any(notes) else 0) + 2 * GAP
    step, down = side + GAP, tall + GAP
    per_prompt = 2 if differences and len(labels) > 1 else 1
    width = left + len(labels) * step + GAP
    corner = _wrapped(caption, small, left - 2 * GAP)
    head_height = max(head_height, 15 * len(corner) + 2 * GAP if caption else 0)
    height = head_height + len(prompts) * (per_prompt * down + GAP) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)

    if caption:
        draw.multiline_text((GAP, GAP), "\n".join(corner), FAINT, small, spacing=2)
    for column, lines in enumerate(heads):
        middle = left + column * step + side // 2
        for number, line in enumerate(lines):
            draw.text((middle, GAP + 19 * number), line, INK, text, anchor="ma")
        if notes:
            at = (middle, GAP + 19 * len(lines))
            draw.text(at, notes[column], FAINT, small, anchor="ma")

    for row, prompt in enumerate(prompts):
        top = head_height + row * (per_prompt * down + GAP)
        lines = _wrapped(prompt, text, left - 2 * GAP)
        if len(lines) > tall // 19:
            lines = [*lines[: tall // 19 - 1], lines[tall // 19 - 1] + " …"]
        offset = max(0, (tall - 19 * len(lines)) // 2)
        for number, line in enumerate(lines):
            draw.text((GAP, top + offset + 19 * number), line, INK, text)
        first = None
        for column, files in enumerate(images):
            image = still(files[row])
            place = left + column * step
            sheet.paste(_sized(image, side), (place, top))
            if per_prompt == 1:
                continue
            pixels = np.asarray(image, dtype=np.int16)
            if first is None:
                first = pixels
                note = f"difference ×{DIFFERENCE_GAIN} to\n{labels[0]}"
                draw.multiline_text((GAP, top + down + GAP), note, FAINT, small)
            else:
                shown = difference(pixels, first, files[row])
                sheet.paste(_sized(Image.fromarray(shown), side), (place, top + down))
    return _save_sheet(sheet, path)


def difference(pixels: np.ndarray, first: np.ndarray, path: Path) -> np.ndarray:
    """Return |pixels − first| × DIFFERENCE_GAIN as uint8, clamped at 255; `path` is for errors."""
    if pixels.shape != first.shape:
        raise LoraqError(f"{path} and the image of the first column differ in size")
    gap = np.abs(pixels.astype(np.int16) - first) * DIFFERENCE_GAIN
    return np.minimum(gap, 255).astype(np.uint8)


@functools.lru_cache(maxsize=4)
def _font(size: int) -> Any:
    """DejaVu Sans from matplotlib, so that images are the same on every machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """Wrap `text` to lines of at most `width` pixels; a wider word is cut with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append("")
            longer = word
        while font.getlength(longer) > width and len(longer) > 2:
            longer = longer.rstrip("…")[:-1] + "…"
        lines[-1] = longer
    return lines


def _own_side(picture: Any, largest: int) -> int:
    """Return a picture's longer side, from 96 to `largest`; small ones grow by an integer."""
    longest = max(picture.size)
    return longest * -(-96 // longest) if longest < 96 else min(longest, largest)


def _sized(image: Any, side: int) -> Any:
    from PIL import Image

    factor = side / max(image.size)
    size = tuple(max(1, round(edge * factor)) for edge in image.size)
    integer = factor >= 1 and factor == int(factor)
    return image.resize(size, Image.Resampling.NEAREST if integer else Image.Resampling.LANCZOS)


def _save_sheet(sheet: Any, path: Path) -> Path:
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=False)
    return write_picture(stream.getvalue(), path)


def write_picture(data: bytes, path: Path) -> Path:
    """Write an image file by `write_bytes`; returns the path."""
    path = Path(path)
    write_bytes(path, data)
    return path
