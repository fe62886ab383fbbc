"""What a run leaves under OUTPUT/results/NAME: the list of its rows, and their records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.results.record import Record, load
from loraq.results.tables.tables import main_table, write_tables
from loraq.results.tables.text import to_markdown

ROWS_FILE = "rows.json"


def rewrite(output: Path, experiments: Sequence[str]) -> str:
    """The tables of experiments that were run, made again from their records; their text."""
    lines = []
    for name in experiments or finished_experiments(output):
        listed, made = read_experiment(output, name)
        write_tables(made, output / "results" / name, listed["baseline"])
        lines += [f"## {name}", "", to_markdown(main_table(made, listed["baseline"]))]
    return "\n".join(lines)


def finished_experiments(output: Path) -> list[str]:
    """Names of the experiments that were published under `output`; LoraqError without any."""
    found = [path.parent.name for path in sorted(output.glob(f"results/*/{ROWS_FILE}"))]
    if not found:
        raise LoraqError(f"No experiment has finished under {output}/. Run one: make demo")
    return found


def read_experiment(output: Path, name: str) -> tuple[dict[str, Any], list[Record]]:
    """What `publish` listed of an experiment, and its records; an unknown name raises."""
    there = finished_experiments(output)
    if name not in there:
        raise unknown("experiment", name, there)
    listed = json.loads((output / "results" / name / ROWS_FILE).read_text())
    return listed, [load(record_file(output, row)) for row in listed["rows"]]


def record_file(output: Path, listed: Mapping[str, str]) -> Path:
    """Where the record of a row lies that `publish` listed."""
    return output / "record" / listed["record"] / "record.json"
