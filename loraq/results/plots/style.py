"""Style of the diagrams: font, palette, reproducible files, label placement."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loraq.utils.files import write_bytes

COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F3C8D",
    "#8C564B",
    "#7A7A7A",
    "#A6A600",
)
"""Okabe and Ito's colour-blind-safe palette and four more; further lines repeat it, dashed."""
FRAME = "#D55E00"  # frame of highlighted cells
DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^vP*Xhp"
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "text.parse_math": False,  # labels with two $ are text
    "legend.fontsize": 8.5,
}


_HEIGHTS = (0, 8, -8, 16, -16, 26, -26, 38, -38, 50, -50)
PLACES = (
    (8, 0, "left"),
    (-8, 0, "right"),
    (0, 11, "center"),
    (0, -11, "center"),
    *((dx, dy, side) for dy in _HEIGHTS[1:] for dx, side in ((9, "left"), (-9, "right"))),
)
"""Candidate label offsets (dx, dy, alignment) in points, nearest first."""


@contextmanager
def figure_at(path: Path, size: tuple[float, float]) -> Iterator[Any]:
    """Yield a figure of `size` inches; write it to `path` if the block ends without an error.

    The file is a PNG, or an SVG with text as outlines if the suffix is .svg. The user's matplotlib
    settings have no effect, and no window system is needed.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(path)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        matplotlib.rcParams["svg.hashsalt"] = path.stem  # reproducible element names
        figure = Figure(figsize=size, dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        yield figure
        stream = io.BytesIO()
        if path.suffix == ".svg":
            figure.savefig(stream, format="svg", metadata={"Date": None})
        else:
            canvas.print_png(stream, metadata={"Software": None})
    write_bytes(path, stream.getvalue())


def line_style(number: int) -> dict[str, Any]:
    """Return colour, dash pattern and width of line `number`."""
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": dash, "linewidth": 1.4}


def log_scale(axes: Any, side: str = "y") -> None:
    """Make an axis logarithmic, with plain-number ticks also if it spans less than a decade."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.set(**{f"{side}scale": "log"})
    axis = getattr(axes, f"{side}axis")
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    if decades < 0.3:
        axis.set_major_locator(MaxNLocator(6))
    elif decades < 3:
        fine = (1, 1.5, 2, 3, 4, 5, 6, 8) if decades < 0.8 else (1, 2, 5)
        axis.set_major_locator(LogLocator(subs=fine))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter("{x:g}")


def label_points(
    axes: Any,
    labels: Sequence[tuple[str, float, float, str]],
    keep_free: Sequence[tuple[float, float, float, float]],
) -> None:
    """Write each (label, x, y, colour) next to its point, with the least overlap of `PLACES`.

    keep_free: strokes (x0, y0, x1, y1) in data coordinates that labels should not cover. A label
    far from its point gets a thin line.
    """
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()  # the layout is known only after drawing
    pixels = figure.dpi / 72
    frame = axes.get_window_extent()
    taken = []
    for x0, y0, x1, y1 in keep_free:
        ends = axes.transData.transform([(x0, min(y0, y1)), (x1, max(y0, y1))])
        taken.append(Bbox(ends).padded(3 * pixels))
    for text, x, y, colour in sorted(labels, key=lambda entry: (-entry[2], entry[1], entry[0])):
        style = {"va": "center", "fontsize": 8, "zorder": 4, "color": _darker(colour)}
        note = axes.annotate(text, (x, y), (0, 0), textcoords="offset points", **style)
        note.set_in_layout(False)
        own = note.get_window_extent()
        best: tuple[float, Any, int, int, str] | None = None
        for dx, dy, side in PLACES:
            left = {"left": 0, "center": -0.5, "right": -1}[side] * own.width
            box = own.translated(dx * pixels + left, dy * pixels)
            cost = sum(_overlap(box, other) for other in taken) + box.width * box.height
            cost -= _overlap(box, frame)
            if best is None or cost < best[0] - 1:
                best = cost, box, dx, dy, side
        assert best is not None  # PLACES is not empty
        _, box, dx, dy, side = best
        note.set_ha(side)
        note.xyann = dx, dy
        taken.append(box.padded(pixels))
        if abs(dy) > 14:
            line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.7, "shrinkA": 2, "shrinkB": 4}
            thin = axes.annotate(
                "", (x, y), (dx, dy), textcoords="offset points", arrowprops=line, zorder=2
            )
            thin.set_in_layout(False)


def _darker(colour: str) -> tuple[float, ...]:
    """Return a darker shade, readable as text on white."""
    from matplotlib.colors import to_rgb

    return tuple(0.65 * part for part in to_rgb(colour))


def _overlap(a: Any, b: Any) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return max(0.0, width) * max(0.0, height)
