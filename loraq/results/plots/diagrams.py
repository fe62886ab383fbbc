"""Draw all diagrams for which an experiment's records hold data. Reads only records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.results.plots.layer_errors import block_numbers
from loraq.results.plots.plots import (
    Point,
    allocation_map,
    convergence_plot,
    pareto_plot,
    steps_plot,
)
from loraq.results.plots.ranking import Ranked, ranking_plot
from loraq.results.record import Record
from loraq.results.tables.columns import metric_column, row_label, summary_metrics

MEMORY_SPREAD = 0.2
"""Smallest range of bits per weight for which quality against memory is plotted."""
POINTS = 16
"""Largest number of rows in a scatter plot; above it labels overlap, so a ranking is drawn."""


def draw_diagrams(
    records: Sequence[Record], folder: Path, suffix: str = ".png", pareto: bool = True
) -> list[Path]:
    """Write every diagram for which the records hold data to `folder`; returns the paths.

    suffix: .png or .svg. pareto: whether to draw quality against memory.
    """
    kinds: list[Callable[[Sequence[Record], Path, str], list[Path]]]
    kinds = [*[_pareto] * pareto, _steps, _losses, _allocations]
    return [path for kind in kinds for path in kind(records, folder, suffix)]


@dataclass(frozen=True)
class Tradeoff:
    """Data of the plot of quality against memory: the rows that have both."""

    points: list[Point]
    metric: str
    higher_is_better: bool

    def __repr__(self) -> str:
        return f"Tradeoff({self.metric!r}, {len(self.points)} rows)"


def tradeoff(records: Sequence[Record]) -> Tradeoff | None:
    """LPIPS (else PSNR) against bits per weight; None if the rows hardly differ in memory.

    Of clips of sound: the distance of spectra (else SNR).
    """
    rows = [r for r in records if r.budget.get("rank") is not None or r.budget.get("nbytes")]
    for name in reversed(summary_metrics(records)):
        measured = [r for r in rows if r.metrics.get(name, {}).get("value") is not None]
        bits = [r.budget["bits_per_weight"] for r in measured]
        if len(bits) < 3 or max(bits) - min(bits) < MEMORY_SPREAD:
            continue
        points = []
        for record in measured:
            entry = record.metrics[name]
            family = str(record.config.get("method", record.row))
            place = record.budget["bits_per_weight"], entry["value"], entry["lo"], entry["hi"]
            points.append(Point(row_label(record), family, *place))
        higher = measured[0].metrics[name].get("direction") == "higher"
        return Tradeoff(points, metric_column(name).title, higher)
    return None


def _pareto(records: Sequence[Record], folder: Path, suffix: str) -> list[Path]:
    found = tradeoff(records)
    if found is None:
        return []
    if len(found.points) > POINTS:
        return _ranking(records, folder, suffix)
    path, higher = folder / f"pareto{suffix}", found.higher_is_better
    return [pareto_plot(found.points, path, y=found.metric, higher_is_better=higher)]


def _ranking(records: Sequence[Record], folder: Path, suffix: str) -> list[Path]:
    """Rank the rows that were compared with the 16-bit images."""
    names = [n for n in summary_metrics(records) if any(n in record.metrics for record in records)]
    rows, higher = [], {}
    for record in records:
        entries = {n: record.metrics.get(n, {}) for n in names}
        if any(entry.get("value") is None for entry in entries.values()):
            continue
        values = {
            metric_column(n).title: (e["value"], e["lo"], e["hi"]) for n, e in entries.items()
        }
        higher = {
            metric_column(n).title: e.get("direction") == "higher" for n, e in entries.items()
        }
        bits = f"{record.budget['bits_per_weight']:.2f}"
        family = str(record.config.get("method", record.row))
        rows.append(Ranked(f"{row_label(record)}  ({bits})", family, values))
    return [ranking_plot(rows, folder / f"ranking{suffix}", higher)] if rows else []


def _steps(records: Sequence[Record], folder: Path, suffix: str) -> list[Path]:
    series = {row_label(r): r.analyses["steps"] for r in records if r.analyses.get("steps")}
    return [steps_plot(series, folder / f"error_steps{suffix}")] if series else []


def _losses(records: Sequence[Record], folder: Path, suffix: str) -> list[Path]:
    """Plot each row's loss per round, the mean over its groups of layers."""
    lines = {}
    for record in records:
        groups = list(record.analyses.get("losses", {}).values())
        rounds = max(map(len, groups), default=0)
        if rounds < 2:
            continue
        last = [
            [*g, *[g[-1]] * (rounds - len(g))] for g in groups
        ]  # a converged group keeps its last loss
        name = row_label(record) + _loss_note(record)
        lines[name] = [sum(v) / len(v) for v in zip(*last, strict=True)]
    return [convergence_plot(lines, folder / f"convergence{suffix}")] if lines else []


def _loss_note(record: Record) -> str:
    """Return the quantity of a row's losses, "" for weight errors."""
    branch = (record.config.get("quant") or {}).get("branch", {})
    if branch.get("select") == "output":
        return " (of outputs)"
    return "" if branch.get("weighting", "none") == "none" else " (weighted)"


def _allocations(records: Sequence[Record], folder: Path, suffix: str) -> list[Path]:
    """Draw the ranks and bits of every row that allocates them."""
    drawn = []
    for record in records:
        choice = {}
        blocks = block_numbers([layer["layer"] for layer in record.layers])
        for layer in record.layers:
            if "rank" in layer:
                place = layer["role"], blocks[layer["layer"]]
                choice[layer["layer"]] = (*place, layer["rank"], layer["bits"])
        if choice:
            path = folder / f"allocation_{record.row}{suffix}"
            drawn.append(allocation_map(choice, path, record.label))
    return drawn
