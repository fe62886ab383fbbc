"""The output of a run under OUTPUT/results/NAME: the list of its rows, and their records."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.results.record import Record, load_record
from loraq.results.tables.tables import main_table, write_tables
from loraq.results.tables.text import to_markdown
from loraq.utils.manifest import check_product
from loraq.utils.output_folder import folder_lock

ROWS_FILE = "rows.json"


def rewrite_tables(output: Path, experiments: Sequence[str]) -> str:
    """Rebuild the tables of experiments (all finished ones if empty); returns the main tables."""
    lines = []
    for name in experiments or finished_experiments(output):
        with folder_lock(output / "results" / name):
            listed, made = read_experiment(output, name)
            write_tables(made, output / "results" / name, listed["baseline"])
        lines += [f"## {name}", "", to_markdown(main_table(made, listed["baseline"]))]
    return "\n".join(lines)


def finished_experiments(output: Path) -> list[str]:
    """Return the names of the experiments finished under `output`; LoraqError if there are none."""
    found = [path.parent.name for path in sorted(output.glob(f"results/*/{ROWS_FILE}"))]
    if not found:
        raise LoraqError(f"No finished experiment under {output}/. Run one: make demo")
    return found


def read_experiment(output: Path, name: str) -> tuple[dict[str, Any], list[Record]]:
    """Return an experiment's rows.json and its records.

    LoraqError for an unknown name, or a file that cannot be read or does not match its manifest.
    """
    finished = finished_experiments(output)
    if name not in finished:
        raise unknown("experiment", name, finished)
    path = output / "results" / name / ROWS_FILE
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
        paths = [record_path(output, row) for row in listed["rows"]]
        listed["baseline"]
    except (ValueError, KeyError, TypeError) as error:
        raise LoraqError(
            f"Cannot read '{path}': {error!r}. Run the experiment again: it writes this file."
        ) from None
    return listed, [read_product_record(path) for path in paths]


def record_path(output: Path, listed: Mapping[str, str]) -> Path:
    """Return the path of the record of a row that rows.json lists."""
    return output / "record" / listed["record"] / "record.json"


def read_product_record(path: Path) -> Record:
    """Read a record from the store; LoraqError if it does not match its manifest."""
    if path.is_file():
        check_product(path.parent, [path.name])
    return load_record(path)
