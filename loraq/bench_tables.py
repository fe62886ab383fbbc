"""What benches measured, as Markdown: a record of `results/bench/` gives one table.

A record's name says which bench made it: `forward_sana_1_6b` is of `experiments.bench.forward`.
Seconds are medians, ratios are of runs side by side in one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from loraq.errors import unknown

Found = dict[str, Any]


def markdown(record: Path) -> str:
    """The record's table and where it comes from; says so where the record is not there."""
    bench = next((name for name in TABLES if record.stem.startswith(name)), None)
    if bench is None:
        raise unknown("bench with a table", record.stem, TABLES)
    command = f"`python -m experiments.bench.{bench}`"
    if not record.is_file():
        return f"*Not yet measured: there is no `results/bench/{record.name}`; {command} makes it.*"
    found = json.loads(record.read_text(encoding="utf-8"))
    machine = f"{found['machine']['device']}, {found['machine']['cpus']} processors"
    origin = f"`results/bench/{record.name}`, made by {command} at `{found['commit']}`; {machine}"
    return "\n".join([*TABLES[bench](found), "", f"{origin}; torch {found['versions']['torch']}."])


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """`text`: how many columns, from the left, hold words."""
    rule = ["---" if place < text else "---:" for place in range(len(titles))]
    return ["| " + " | ".join(cells) + " |" for cells in (titles, rule, *rows)]


def _forward(found: Found) -> list[str]:
    """A block's ways, and the quantised layers' sums; the set's bytes as they are stored."""
    modules, settings = found["modules"], found["settings"]
    block, *layers = (modules[name] for name in sorted(modules, key=len))
    size, first = settings["bytes"], settings["ways"][0]
    # repeat by repeat: all ways of one repeat ran next to one another
    sums = {
        way: [sum(repeat) for repeat in zip(*(one[way]["seconds"] for one in layers), strict=True)]
        for way in settings["ways"]
    }
    rows = [
        (
            way,
            f"{1000 * block[way]['median_seconds']:.0f}",
            f"{block[way]['ratio']:.2f}",
            f"{1000 * median(sums[way]):.0f}",
            f"{median(a / b for a, b in zip(sums[way], sums[first], strict=True)):.2f}",
            "–" if size[way] is None else f"{size[way] / size[first]:.3f}",
        )
        for way in settings["ways"]
    ]
    over = f"over {first}"
    titles = ("way", "block, ms", over, "its layers, ms", over, "stored bytes")
    return _table(titles, rows)


def _quantise(found: Found) -> list[str]:
    rows = [
        (
            name,
            f"{row['bits_per_weight']:.3f}",
            f"{row['median_seconds']['library']:.1f}",
            f"{row['median_seconds']['reference']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['weight_error']['library']:.5f}",
            f"{row['weight_error']['reference']:.5f}",
        )
        for name, row in found["methods"].items()
    ]
    titles = ("method", "bits/weight", "seconds", "one by one", "ratio", "error", "one by one")
    return _table(titles, rows)


def _round_trip(found: Found) -> list[str]:
    rows = [
        (
            row["main"],
            str(row["branch_bits"]),
            f"{row['bits_per_weight']:.3f}",
            "yes" if row["identical"] else "**no**",
            f"{100 * (row['stored_bytes'] / row['stated_bytes'] - 1):+.2f} %",
            f"{row['load_seconds']:.2f}",
            f"{row['anonymous_bytes'] / 1e6:.1f}",
        )
        for row in found["rows"]
    ]
    titles = (
        *("main", "branch bits", "bits/weight", "same bits"),
        *("bytes over budget", "load, s", "held, MB"),
    )
    return _table(titles, rows)


def _metrics(found: Found) -> list[str]:
    rows = [
        (
            name,
            f"{row['images_per_second']:.1f}",
            f"{row['hours_for_5000']:.1f}",
            f"{row['peak_bytes'] / 1e9:.2f}",
            f"{row['peak_growth']:.2f}",
        )
        for name, row in found["metrics"].items()
    ]
    titles = ("metric", "images/s", "hours for 5000", "peak, GB", "peak over a quarter's")
    return _table(titles, rows)


def _parity(found: Found) -> list[str]:
    rows = [
        (
            *(row["metric"], row["reference"], row["inputs"]),
            f"{row['difference']:.1e}{' (relative)' if row['relative'] else ''}",
            f"{row['bound']:.0e}",
        )
        for row in found["rows"]
    ]
    return _table(("metric", "reference", "inputs", "largest difference", "bound"), rows, text=3)


TABLES: dict[str, Callable[[Found], list[str]]] = {
    "forward": _forward,
    "metrics": _metrics,
    "parity": _parity,
    "quantise": _quantise,
    "round_trip": _round_trip,
}
