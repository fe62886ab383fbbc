"""Interactive plot of quality against memory: positions in the pixels of an SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from loraq.results.plots.diagrams import tradeoff
from loraq.results.plots.plots import Point, frontier
from loraq.results.plots.style import COLOURS
from loraq.results.record import Record
from loraq.results.report.figures import at_night

WIDTH, HEIGHT = 820, 460
LEFT, RIGHT, TOP, BOTTOM = 66, 24, 14, 50
LETTER, LINE = 6.6, 15  # approximate width of a letter and height of a line of a label, in pixels
SHAPES = (
    "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0z",
    "M-5,-5h10v10h-10z",
    "M0,-6.5l6.5,6.5l-6.5,6.5l-6.5,-6.5z",
    "M0,-6l6,10.5h-12z",
    "M0,6l6,-10.5h-12z",
    "M-2,-6h4v4h4v4h-4v4h-4v-4h-4v-4h4z",
)
LOGARITHMIC = 3.0  # smallest ratio of maximum to minimum for a logarithmic axis
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Axis:
    """Maps numbers from `low` to `high` to pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float
    logarithmic: bool

    def __call__(self, number: float) -> float:
        low, high, at = (self._scaled(value) for value in (self.low, self.high, number))
        share = min(1.02, max(-0.02, (at - low) / (high - low)))
        return round(self.start + share * (self.end - self.start), 1)

    def _scaled(self, number: float) -> float:
        return math.log(max(number, 1e-12)) if self.logarithmic else number

    @property
    def ticks(self) -> list[tuple[str, float]]:
        """Labels and pixels of the ticks."""
        from matplotlib.ticker import LogLocator, MaxNLocator

        fine = (1, 1.5, 2, 3, 4, 5, 6, 8) if self.high / max(self.low, 1e-12) < 8 else (1, 2, 5)
        locator = LogLocator(subs=fine) if self.logarithmic else MaxNLocator(6)
        found = [float(tick) for tick in locator.tick_values(self.low, self.high)]
        return [(f"{tick:.5g}", self(tick)) for tick in found if self.low <= tick <= self.high]


@dataclass(frozen=True)
class Mark:
    """One row: position, ends of its error bar, and (x, y, anchor) of its label if it fits."""

    label: str
    reading: str
    family: int
    x: float
    y: float
    bar: tuple[float, float] | None
    text: tuple[float, float, str] | None


@dataclass(frozen=True)
class Pareto:
    """The complete diagram; families are (name, light colour, dark colour, shape).

    edge: the SVG path of the Pareto frontier.
    """

    metric: str
    better: str
    x: Axis
    y: Axis
    marks: list[Mark]
    families: list[tuple[str, str, str, str]]
    edge: str
    size: tuple[int, int] = (WIDTH, HEIGHT)

    def __repr__(self) -> str:
        return f"Pareto({self.metric!r}, {len(self.marks)} rows)"


def make_pareto(records: Sequence[Record], first: Sequence[Record]) -> Pareto | None:
    """Build the diagram; None if rows hardly differ in memory. `first`: rows labelled first."""
    found = tradeoff(records)
    if found is None:
        return None
    points, higher = found.points, found.higher_is_better
    x = _axis([p.x for p in points], LEFT, WIDTH - RIGHT, 0.28)
    ends = [end for p in points for end in (p.y, p.lo, p.hi) if end is not None]
    y = _axis(ends, HEIGHT - BOTTOM, TOP)
    front = frontier(points, higher)
    names = list(dict.fromkeys(p.family for p in points))
    wanted = {record.label or record.row for record in first}
    order = sorted(points, key=lambda p: (p not in front, p.label not in wanted))
    corners = [(x(front[0].x), y(front[0].y))]
    for p in front[1:]:
        corners += [(x(p.x), corners[-1][1]), (x(p.x), y(p.y))]
    corners.append((WIDTH - RIGHT, corners[-1][1]))
    texts = _labels(order, x, y, corners)
    marks = [
        Mark(
            p.label,
            _reading(p, found.metric),
            names.index(p.family),
            x(p.x),
            y(p.y),
            None if p.lo is None or p.hi is None else (y(p.lo), y(p.hi)),
            texts.get(p.label),
        )
        for p in points
    ]
    edge = "M" + "L".join(f"{across},{down}" for across, down in corners)
    families = [(name, *_family_style(number)) for number, name in enumerate(names)]
    better = "higher is better" if higher else "lower is better"
    return Pareto(found.metric, better, x, y, marks, families, edge)


def _axis(values: Sequence[float], start: float, end: float, after: float = 0.08) -> Axis:
    """Axis with a small margin before the values and `after` of their range behind them."""
    low, high = min(values), max(values)
    if low > 0 and high / low >= LOGARITHMIC:
        return Axis(low / (high / low) ** 0.06, high * (high / low) ** after, start, end, True)
    span = (high - low) or 1.0
    return Axis(low - 0.08 * span, high + after * span, start, end, False)


def _reading(point: Point, metric: str) -> str:
    interval = "" if point.lo is None else f" [{point.lo:.4g}, {point.hi:.4g}]"
    return f"{point.x:.3f} bits per weight, {metric} {point.y:.4g}{interval}"


def _family_style(number: int) -> tuple[str, str, str]:
    colour = COLOURS[number % len(COLOURS)].lower()
    return colour, at_night(colour), SHAPES[number % len(SHAPES)]


def _labels(
    order: Sequence[Point], x: Axis, y: Axis, corners: Sequence[tuple[float, float]]
) -> dict[str, tuple[float, float, str]]:
    """Return label → (x, y, anchor) of the labels that overlap no mark, line or earlier label."""
    taken: list[Box] = [(x(p.x) - 6, y(p.y) - 6, x(p.x) + 6, y(p.y) + 6) for p in order]
    for p in order:
        if p.lo is not None and p.hi is not None:
            low, high = sorted((y(p.lo), y(p.hi)))
            taken.append((x(p.x) - 2, low, x(p.x) + 2, high))
    for (x0, y0), (x1, y1) in itertools.pairwise(corners):
        taken.append((min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    placed = {}
    for point in order:
        width = LETTER * len(point.label)
        for place in _candidates(x(point.x), y(point.y), width):
            box = place[:4]
            inside = box[0] >= LEFT and box[2] <= WIDTH - 4 and box[1] >= 0
            if inside and box[3] <= HEIGHT - BOTTOM and not any(_intersect(box, o) for o in taken):
                taken.append(box)
                placed[point.label] = place[4]
                break
    return placed


def _candidates(
    x: float, y: float, width: float
) -> list[tuple[float, float, float, float, tuple[float, float, str]]]:
    """Return candidate boxes next to a mark, nearest first, each with its (x, y, anchor)."""
    found = []
    for down in (0, -10, 10, -16, 16):
        top, base = y + down - LINE / 2, round(y + down + 4, 1)
        found.append((x + 10, top, x + 10 + width, top + LINE, (x + 10, base, "start")))
        found.append((x - 10 - width, top, x - 10, top + LINE, (x - 10, base, "end")))
    return found


def _intersect(a: Sequence[float], b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]
