"""Tables of the record that `make test-gpu` writes, `results/bench/gpu.json`, by part."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.results.pages.bench import Columns, Found, columns_table, yes_no
from loraq.utils.machine import machine_text

RECORD = Path("results") / "bench" / "gpu.json"


def gpu_block(part: str, root: Path) -> str:
    """The table of one part and what made it, or a sentence if no GPU has been measured."""
    if part not in PARTS:
        raise unknown("part of make test-gpu", part, PARTS)
    if not (root / RECORD).is_file():
        return f"*Not yet measured: there is no `{RECORD}`; `make test-gpu` on a GPU makes it.*"
    found = json.loads((root / RECORD).read_text(encoding="utf-8"))
    if found["settings"]["dry"]:
        raise LoraqError(
            f"{RECORD} is the record of a dry run, whose times mean nothing. Delete it."
        )
    rows = found["parts"].get(part, {"rows": [], "skipped": []})
    lines = PARTS[part]([row for row in rows["rows"] if "error" not in row])
    failed = [f"`{row['name']}`: {row['error']}" for row in rows["rows"] if "error" in row]
    for text, names in (("Failed", failed), ("Skipped for want of time", rows["skipped"])):
        if names:
            lines += ["", f"{text}: {'; '.join(names)}."]
    origin = f"`{RECORD}`, made by `make test-gpu` at `{found['commit']}`"
    machine = machine_text(found["machine"])
    return "\n".join([*lines, "", f"{origin}; {machine}; torch {found['versions']['torch']}."])


def _right(rows: list[Found]) -> list[str]:
    """How many checks of each kind hold, and the largest distance from the definition."""
    kinds: dict[str, list[Found]] = {}
    for row in rows:
        kinds.setdefault(row["name"].partition(":")[0], []).append(row)
    columns: Columns = {
        "check": lambda kind: kind[0],
        "hold": lambda kind: f"{sum(row['holds'] for row in kind[1])} of {len(kind[1])}",
        "largest distance": lambda kind: _largest(kind[1]),
    }
    return columns_table(columns, kinds.items())


def _largest(rows: list[Found]) -> str:
    found = [row["distance"] for row in rows if "distance" in row]
    return f"{max(found):.1e}" if found else "–"


def _blocks(rows: list[Found]) -> list[str]:
    """A line per model, batch and way."""
    flat = [
        {"model": row["model"], "images": row["images"], "way": way, **measured}
        for row in rows
        for way, measured in row["ways"].items()
    ]
    columns: Columns = {
        "model": lambda row: row["model"],
        "images": lambda row: str(row["images"]),
        "way": lambda row: row["way"],
        "ms": lambda row: f"{1000 * row['seconds']:.2f}",
        "relative to 16-bit": lambda row: f"{row['ratio']:.2f}",
        "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
    }
    return columns_table(columns, flat, text=3)


LOOPS: Columns = {
    "model": lambda row: row["model"],
    "way": lambda row: row["way"],
    "images": lambda row: str(row["images"]),
    "seconds": lambda row: f"{row['seconds']:.2f}",
    "images per minute": lambda row: f"{row['images_per_minute']:.1f}",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
}

QUANTISING: Columns = {
    "model": lambda row: row["model"],
    "method": lambda row: row["method"],
    "blocks": lambda row: str(row["blocks"]),
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "bits/weight": lambda row: f"{row['bits_per_weight']:.3f}",
    "peak, GB": lambda row: f"{row['peak_bytes'] / 1e9:.2f}",
}

TOGETHER: Columns = {
    "GPUs": lambda row: str(row["gpus"]),
    "images": lambda row: str(row["images"]),
    "same images as one process": lambda row: yes_no(row["holds"]),
}

PARTS: dict[str, Callable[[list[Any]], list[str]]] = {
    "right": _right,
    "blocks": _blocks,
    "quantising": lambda rows: columns_table(QUANTISING, rows, 2),
    "loops": lambda rows: columns_table(LOOPS, rows, 2),
    "together": lambda rows: columns_table(TOGETHER, rows, 0),
}
