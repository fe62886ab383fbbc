"""Diagrams of results: errors over steps, quality against memory, convergence, allocation.

Equal input gives files with equal bytes.
"""

from __future__ import annotations

import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError
from loraq.results.plots.style import FRAME, MARKERS, figure_at, label_points, line_style, log_scale


@dataclass(frozen=True)
class Point:
    """One row: memory `x`, metric `y` and its interval (None: no error bar)."""

    label: str
    family: str
    x: float
    y: float
    lo: float | None = None
    hi: float | None = None


PANEL_TITLE = 36  # characters per line


def steps_plot(
    series: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    title: str = "",
    *,
    steps: Sequence[int] | None = None,
    y: str = "relative error of the output",
) -> Path:
    """Write a PNG with one panel per row and one line per role: error by denoising step.

    series[row][role]: the errors at `steps` (None: 0, 1, 2 …); the role 'all' is drawn in black.
    All panels share one logarithmic axis; the legend is sorted by mean error.
    """
    roles: dict[str, list[float]] = {}
    for lines in series.values():
        for role, values in lines.items():
            roles.setdefault(role, []).extend(value for value in values if value > 0)
    if not any(roles.values()):
        raise LoraqError(f"{len(series)} rows without an error above 0: nothing to draw")
    lengths = {len(values) for lines in series.values() for values in lines.values()}
    if steps is not None and lengths != {len(steps)}:
        raise LoraqError(
            f"{len(steps)} steps for {sorted(lengths)} values: give one step per value"
        )
    order = sorted(
        roles, key=lambda role: (role != "all", -sum(roles[role]) / max(1, len(roles[role])))
    )
    looks = {role: line_style(number) for number, role in enumerate(r for r in roles if r != "all")}
    looks["all"] = {"color": "black", "linewidth": 2.2}
    columns = min(len(series), 3)
    lines_of_panels = -(-len(series) // columns)
    size = (3.1 * columns + 1.5, 2.9 * lines_of_panels + 0.4)
    with figure_at(path, size) as figure:
        axes = figure.subplots(
            lines_of_panels, columns, sharex=True, sharey=True, squeeze=False
        ).ravel()
        handles: dict[str, Any] = {}
        for axis, (row, lines) in zip(axes, series.items(), strict=False):
            for role in order[::-1]:
                if role in lines:
                    places = range(len(lines[role])) if steps is None else steps
                    values = [value if value > 0 else math.nan for value in lines[role]]
                    handles[role] = axis.plot(places, values, **looks[role])[0]
            axis.set_title(textwrap.fill(row, PANEL_TITLE))
            axis.xaxis.get_major_locator().set_params(integer=True)
        log_scale(axes[0])
        for number in range(len(series), len(axes)):
            axes[number].axis("off")
            axes[number - columns].tick_params(labelbottom=True)
        figure.supxlabel("denoising step", fontsize=9)
        figure.supylabel(y, fontsize=9)
        figure.suptitle(title or None, fontsize=11)
        shown = [role for role in order if role in handles]
        figure.legend([handles[role] for role in shown], shown, loc="outside right center")
    return Path(path)


def pareto_plot(
    points: Sequence[Point],
    path: Path,
    *,
    x: str = "total bits per weight",
    y: str = "PSNR (dB)",
    higher_is_better: bool = True,
    title: str = "",
) -> Path:
    """Write a PNG of metric against memory: labelled points, error bars, Pareto frontier.

    The frontier, a step line, is the best value at or below each memory size.
    """
    invalid = [p.label for p in points if not (math.isfinite(p.x) and math.isfinite(p.y))]
    if invalid or not points:
        raise LoraqError(
            f"{len(points)} points, not finite: {invalid or 'none'}. Give finite points."
        )
    families = list(dict.fromkeys(point.family for point in points))
    colours = {family: line_style(number)["color"] for number, family in enumerate(families)}
    with figure_at(path, (7.6, 4.8)) as figure:
        axis = figure.subplots()
        for number, family in enumerate(families):
            own = [point for point in points if point.family == family]
            bars = [[_arm(p.y, p.lo) for p in own], [_arm(p.y, p.hi) for p in own]]
            axis.errorbar(
                [p.x for p in own], [p.y for p in own], bars, label=family, linestyle="none",
                marker=MARKERS[number % len(MARKERS)], color=colours[family],
                markersize=7, markeredgecolor="white", elinewidth=1.2, capsize=2.5, zorder=3,
            )  # fmt: skip
        axis.margins(x=0.17, y=0.1)
        front = frontier(points, higher_is_better)
        right = axis.get_xlim()[1]
        edge_x = [*[x for point in front for x in (point.x, point.x)][1:], right]
        edge_y = [y for point in front for y in (point.y, point.y)]
        axis.plot(edge_x, edge_y, color="0.45", linewidth=1.2, zorder=1, label="frontier")
        axis.set_xlim(right=right)
        axis.set_xlabel(x)
        axis.set_ylabel(f"{y}   ({'higher' if higher_is_better else 'lower'} is better)")
        axis.set_title(title)
        figure.legend(loc="outside right upper")
        corners = list(zip(edge_x, edge_y, strict=True))
        strokes = [(*start, *end) for start, end in itertools.pairwise(corners)]
        for p in points:
            ends = (p.y if end is None else end for end in (p.lo, p.hi))
            strokes.append((p.x, next(ends), p.x, next(ends)))
        label_points(axis, [(p.label, p.x, p.y, colours[p.family]) for p in points], strokes)
    return Path(path)


def frontier(points: Sequence[Point], higher_is_better: bool = True) -> list[Point]:
    """Return the points that no other point with the same or less memory equals, by memory."""
    sign = 1 if higher_is_better else -1
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if not front or sign * point.y > sign * front[-1].y:
            front.append(point)
    return front


def convergence_plot(
    losses: Mapping[str, Sequence[float]],
    path: Path,
    title: str = "",
    y: str = "mean relative error of the weights",
) -> Path:
    """Write a PNG of loss per round on logarithmic axes: one line per run, labelled by its end."""
    kept = {name: list(values) for name, values in losses.items() if len(values)}
    if not any(value > 0 for values in kept.values() for value in values):
        raise LoraqError(f"{len(losses)} runs without a loss above 0: nothing to draw")
    with figure_at(path, (7.2, 4.0)) as figure:
        axis = figure.subplots()
        for number, (name, values) in enumerate(kept.items()):
            style = line_style(number)
            label = f"{name}:  {values[-1]:.4g} after {len(values)}"
            axis.plot(range(1, len(values) + 1), values, label=label, **style)
            axis.plot(len(values), values[-1], "o", color=style["color"], markersize=5)
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        log_scale(axis)
        axis.set_xlabel("round")
        axis.set_ylabel(y)
        axis.set_title(title)
        figure.legend(loc="outside right upper")
    return Path(path)


def allocation_map(
    choice: Mapping[str, tuple[str, int, int, int]], path: Path, title: str = ""
) -> Path:
    """Write a PNG of ranks, role × block, from name → (role, block, rank, bits).

    Colour and number show the rank; cells with bits ≠ 4 have a frame and the number of bits.
    """
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    if not choice:
        raise LoraqError("The allocation has no layers: nothing to draw")
    roles = list(dict.fromkeys(role for role, *_ in choice.values()))
    depths = sorted({depth for _, depth, *_ in choice.values()})
    ranks = np.full((len(roles), len(depths)), np.nan)
    bits: dict[tuple[int, int], int] = {}
    for name, (role, depth, rank, own_bits) in choice.items():
        place = roles.index(role), depths.index(depth)
        if place in bits and (bits[place], ranks[place]) != (own_bits, rank):
            raise LoraqError(
                f"'{name}': role {role} of block {depth} already has a different entry"
            )
        ranks[place], bits[place] = rank, own_bits
    with figure_at(path, (2.6 + 0.55 * len(depths), 1.3 + 0.42 * len(roles))) as figure:
        axis = figure.subplots()
        axis.grid(False)
        top = max(float(np.nanmax(ranks)), 1.0)
        light = ListedColormap(colormaps["YlGnBu"](np.linspace(0, 0.75, 256)))
        drawn = axis.imshow(ranks, cmap=light, vmin=0, vmax=top, aspect="auto")
        axis.set_yticks(range(len(roles)), roles)
        axis.set_xticks(range(len(depths)), depths)
        axis.set_xlabel("block")
        axis.set_title(title)
        for (row, column), own_bits in bits.items():
            shown = float(ranks[row, column])
            text = f"{shown:.0f}" + (f"\n{own_bits}-bit" if own_bits != 4 else "")
            colour = "white" if shown > 0.7 * top else "black"
            axis.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
            if own_bits != 4:
                corner = column - 0.46, row - 0.45
                frame = Rectangle(corner, 0.92, 0.9, fill=False, edgecolor=FRAME, linewidth=2)
                axis.add_patch(frame)
        figure.colorbar(drawn, ax=axis, label="rank").locator = MaxNLocator(integer=True)
    return Path(path)


def _arm(value: float, end: float | None) -> float:
    """Return the length of one side of an error bar; NaN draws nothing."""
    return math.nan if end is None else max(0.0, abs(end - value))
