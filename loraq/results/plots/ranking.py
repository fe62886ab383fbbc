"""Ranking plot: all rows of a table in order, for tables too long for a scatter plot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.results.plots.style import figure_at, line_style, log_scale


@dataclass(frozen=True)
class Ranked:
    """One row: label, family (its colour), and metric → (value, low, high)."""

    label: str
    family: str
    values: Mapping[str, tuple[float, float | None, float | None]]


def ranking_plot(
    rows: Sequence[Ranked], path: Path, higher: Mapping[str, bool], title: str = ""
) -> Path:
    """Write a PNG with one panel per metric: dots with intervals, the best row at the top.

    higher: metric → whether higher is better; rows are sorted by its first metric. A metric for
    which lower is better has a logarithmic axis if all values are positive.
    """
    lacking = [row.label for row in rows if not set(higher) <= set(row.values)]
    if not rows or not higher or lacking:
        raise LoraqError(
            f"{len(rows)} rows; without all of {list(higher)}: {lacking or 'none'}. Give all."
        )
    first, more = next(iter(higher.items()))
    order = sorted(rows, key=lambda row: row.values[first][0], reverse=not more)
    families = list(dict.fromkeys(row.family for row in rows))
    colours = {family: line_style(number)["color"] for number, family in enumerate(families)}
    dots: dict[str, Any] = {}
    size = (3.4 + 3.0 * len(higher), 1.0 + 0.235 * len(rows))
    with figure_at(path, size) as figure:
        panels = figure.subplots(1, len(higher), sharey=True, squeeze=False)[0]
        for axes, (metric, better_high) in zip(panels, higher.items(), strict=True):
            for place, row in enumerate(order):
                value, low, high = row.values[metric]
                style = {"color": colours[row.family]}
                if low is not None and high is not None:
                    axes.plot([low, high], [place, place], linewidth=1.6, alpha=0.6, **style)
                (dot,) = axes.plot(value, place, "o", markersize=5, linestyle="none", **style)
                dots[row.family] = dot
            axes.set_xlabel(f"{metric}   ({'higher' if better_high else 'lower'} is better)")
            axes.set_ylim(-0.7, len(order) - 0.3)
            if not better_high and min(row.values[metric][0] for row in rows) > 0:
                log_scale(axes, "x")
        panels[0].set_yticks(range(len(order)), [row.label for row in order], fontsize=8)
        figure.suptitle(title or None, fontsize=11)
        figure.legend([dots[family] for family in families], families, loc="outside right upper")
    return Path(path)
