"""Heat maps of layer errors, role × depth, one per row."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError
from loraq.results.plots.grid import write_picture
from loraq.results.record import Record


def layer_error_map(
    records: Sequence[Record], path: Path, error: str = "output_error", columns: int = 3
) -> Path:
    """Write a PNG with one heat map per row: the relative error of each layer, role × depth.

    All maps share one logarithmic scale, so that their colours can be compared. Rows without
    quantised layers are omitted; LoraqError if none remains.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    shown = [record for record in records if any(layer.get(error) for layer in record.layers)]
    if not shown:
        raise LoraqError(f"No record has a layer with a {error} above 0: nothing to draw")
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
    return write_picture(stream.getvalue(), path)


def block_numbers(names: Sequence[str]) -> dict[str, int]:
    """Layer → the number of its block, counted through all lists of blocks in their order.

    FLUX has two lists of blocks, and Wan 2.2 two experts.
    """
    places = {name: re.match(r"(.*?)(?:^|\.)(\d+)(?:\.|$)", name) for name in names}
    lengths: dict[str, int] = {}
    for found in filter(None, places.values()):
        lengths[found[1]] = max(lengths.get(found[1], 0), int(found[2]) + 1)
    before = dict(zip(lengths, accumulate(lengths.values(), initial=0), strict=False))
    return {name: before[m[1]] + int(m[2]) if m else 0 for name, m in places.items()}


def role_by_depth(record: Record, error: str) -> tuple[list[str], list[int], np.ndarray]:
    """Return roles, depths, and errors of shape [role, depth] (NaN where no layer exists)."""
    found: dict[tuple[str, int], list[float]] = {}
    blocks = block_numbers([layer["layer"] for layer in record.layers])
    for layer in record.layers:
        place = layer["role"], blocks[layer["layer"]]
        if layer.get(error) is not None:
            found.setdefault(place, []).append(layer[error])
    roles = list(dict.fromkeys(role for role, _ in found))
    depths = sorted({depth for _, depth in found})
    field = np.full((len(roles), len(depths)), np.nan)
    for (role, depth), errors in found.items():
        field[roles.index(role), depths.index(depth)] = sum(errors) / len(errors)
    return roles, depths, field
