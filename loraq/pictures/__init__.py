"""What a person looks at: images of every row side by side, and where in the network errors lie.

Pictures are made from image files and records; they measure nothing.
"""

from __future__ import annotations

import functools
import io
import math
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError
from loraq.record import Record
from loraq.utils.files import write_bytes

INK = (20, 20, 20)
FAINT = (110, 110, 110)
PAPER = (255, 255, 255)
GAP = 6
DIFFERENCE_GAIN = 4


def grid(
    labels: Sequence[str],
    images: Sequence[Sequence[Path]],
    prompts: Sequence[str],
    path: Path,
    *,
    notes: Sequence[str] = (),
    differences: bool = False,
    side: int | None = None,
) -> Path:
    """A PNG of prompts (rows) × methods (columns): names on top, prompts at the left.

    images[column][row] are files; `notes` go under the columns' names, such as "31.2 dB".
    `differences` adds under each row |image − image of the first column| × 4 for the other columns.
    Images are shown at `side` pixels, by default at their own size within 96 to 256: enlarged by
    whole factors without smoothing, else resampled.
    """
    from PIL import Image, ImageDraw

    if len(labels) != len(images) or not labels:
        raise LoraqError(f"{len(labels)} labels for {len(images)} columns of images")
    short = [len(column) for column in images if len(column) != len(prompts)]
    if short or not prompts:
        raise LoraqError(f"{len(prompts)} prompts, but a column has {short or 0} images")

    side = side or _own_side(images[0][0])
    text, small = _font(15), _font(12)
    left = 170
    heads = [_wrapped(label, text, side) for label in labels]
    head_height = max(len(lines) for lines in heads) * 19 + (18 if any(notes) else 0) + 2 * GAP
    step = side + GAP
    per_prompt = 2 if differences and len(labels) > 1 else 1
    width = left + len(labels) * step + GAP
    height = head_height + len(prompts) * (per_prompt * step + GAP) + GAP
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)

    for column, lines in enumerate(heads):
        middle = left + column * step + side // 2
        for number, line in enumerate(lines):
            draw.text((middle, GAP + 19 * number), line, INK, text, anchor="ma")
        if notes:
            at = (middle, GAP + 19 * len(lines))
            draw.text(at, notes[column], FAINT, small, anchor="ma")

    for row, prompt in enumerate(prompts):
        top = head_height + row * (per_prompt * step + GAP)
        lines = _wrapped(prompt, text, left - 2 * GAP)
        if len(lines) > side // 19:
            lines = [*lines[: side // 19 - 1], lines[side // 19 - 1] + " …"]
        offset = max(0, (side - 19 * len(lines)) // 2)
        for number, line in enumerate(lines):
            draw.text((GAP, top + offset + 19 * number), line, INK, text)
        first = None
        for column, files in enumerate(images):
            image = _read(files[row])
            place = left + column * step
            sheet.paste(_sized(image, side), (place, top))
            if per_prompt == 1:
                continue
            pixels = np.asarray(image, dtype=np.int16)
            if first is None:
                first = pixels
                note = f"difference ×{DIFFERENCE_GAIN} to\n{labels[0]}"
                draw.multiline_text((GAP, top + step + GAP), note, FAINT, small)
            else:
                shown = difference(pixels, first, files[row])
                sheet.paste(_sized(Image.fromarray(shown), side), (place, top + step))
    return _save(sheet, path)


def difference(pixels: np.ndarray, first: np.ndarray, path: Path) -> np.ndarray:
    """uint8 |pixels − first| × DIFFERENCE_GAIN, cut at 255; `path` is the image's, for errors."""
    if pixels.shape != first.shape:
        raise LoraqError(f"{path} has another size than the first column's image")
    gap = np.abs(pixels.astype(np.int16) - first) * DIFFERENCE_GAIN
    return np.minimum(gap, 255).astype(np.uint8)


def layer_error_map(
    records: Sequence[Record], path: Path, error: str = "output_error", columns: int = 3
) -> Path:
    """A PNG of one heat map a row: role × depth, the layer's relative error in each field.

    All maps share one logarithmic scale, so that their colours can be compared. Rows without
    quantised layers are left out.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = [record for record in records if any(layer.get(error) for layer in record.layers)]
    if not shown:
        raise LoraqError(f"no record has a layer with a {error} above 0: nothing to draw")
    fields = {record.row: role_by_depth(record, error) for record in shown}
    values = np.concatenate([field[2].ravel() for field in fields.values()])
    values = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(values.min(), max(values.max(), values.min() * 1.01))

    columns = min(columns, math.ceil(math.sqrt(len(shown))))
    lines = -(-len(shown) // columns)
    roles, depths, _ = fields[shown[0].row]
    panel = 1.6 + 0.55 * len(depths)  # inches
    size = (columns * panel + 1, lines * (0.9 + 0.33 * len(roles)) + 0.3)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False)
    drawn: Any = None
    for place, axis in enumerate(axes.ravel()):
        if place >= len(shown):
            axis.axis("off")
            continue
        record = shown[place]
        roles, depths, field = fields[record.row]
        drawn = axis.imshow(field, norm=norm, cmap="viridis", aspect="auto")
        axis.grid(False)
        title = f"{record.label or record.row}  (mean {np.nanmean(field):.3f})"
        axis.set_title(textwrap.fill(title, int(11 * panel)), fontsize=9)
        axis.set_yticks(range(len(roles)), roles, fontsize=8)
        axis.set_xticks(range(len(depths)), depths, fontsize=8)
        if place // columns == lines - 1 or place + columns >= len(shown):
            axis.set_xlabel("block", fontsize=8)
        if field.size > 400:
            continue
        for (y, x), value in np.ndenumerate(field):
            if np.isfinite(value):
                dark = norm(max(value, values.min())) < 0.6
                label = f"{value:.3f}".lstrip("0")
                colour = "white" if dark else "black"
                axis.text(x, y, label, ha="center", va="center", fontsize=6, color=colour)
    figure.colorbar(drawn, ax=axes, label=f"relative {error.replace('_', ' ')}", shrink=0.8)
    stream = io.BytesIO()
    canvas.print_png(stream, metadata={"Software": None})
    return _written(stream.getvalue(), path)


def role_by_depth(record: Record, error: str) -> tuple[list[str], list[int], np.ndarray]:
    """Roles, depths and the errors between them (NaN where there is no such layer)."""
    found: dict[tuple[str, int], list[float]] = {}
    for layer in record.layers:
        number = re.search(r"\.(\d+)\.", f".{layer['layer']}.")
        place = (layer["role"], int(number[1]) if number else 0)
        if layer.get(error) is not None:
            found.setdefault(place, []).append(layer[error])
    roles = list(dict.fromkeys(role for role, _ in found))
    depths = sorted({depth for _, depth in found})
    field = np.full((len(roles), len(depths)), np.nan)
    for (role, depth), errors in found.items():
        field[roles.index(role), depths.index(depth)] = sum(errors) / len(errors)
    return roles, depths, field


@functools.lru_cache(maxsize=4)
def _font(size: int) -> Any:
    """DejaVu Sans as matplotlib ships it: the same letters on every machine."""
    import matplotlib
    from PIL import ImageFont

    return ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """`text` in lines of at most `width` pixels; a word that is wider is cut with an ellipsis."""
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


def _own_side(path: Path) -> int:
    """The longer side of an image, brought into 96 to 256 pixels, by a whole factor if small."""
    longest = max(_read(path).size)
    return longest * -(-96 // longest) if longest < 96 else min(longest, 256)


def _sized(image: Any, side: int) -> Any:
    from PIL import Image

    factor = side / max(image.size)
    size = tuple(max(1, round(edge * factor)) for edge in image.size)
    whole = factor >= 1 and factor == int(factor)
    return image.resize(size, Image.Resampling.NEAREST if whole else Image.Resampling.LANCZOS)


def _read(path: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise LoraqError(f"cannot read the image {path}: {error}") from error


def _save(sheet: Any, path: Path) -> Path:
    stream = io.BytesIO()
    sheet.save(stream, format="PNG", optimize=False)
    return _written(stream.getvalue(), path)


def _written(data: bytes, path: Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path
