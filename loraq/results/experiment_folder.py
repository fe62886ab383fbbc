"""The output of a run under OUTPUT/results/NAME: the list of its rows, and their records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.results.record import Record, load_record
from loraq.results.tables.tables import main_table, write_tables
from loraq.results.tables.text import to_markdown
from loraq.utils.manifest import check_product
from loraq.utils.output_folder import folder_lock
from loraq.utils.plain import parse_json
from loraq.utils.shape import Shape, check_shape

ROWS_FILE = "rows.json"
_ROWS: Shape = {
    "baseline": (str, None),
    "rows": [{"row": str, "record": str, "?images": (str, None)}],
}


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
    listed = read_rows(output / "results" / name)
    paths = [record_path(output, row) for row in listed["rows"]]
    return listed, [read_product_record(path) for path in paths]


def read_rows(folder: Path) -> dict[str, Any]:
    """Return a folder's rows.json: `baseline`, and `rows` with `row`, `record` and `images`.

    LoraqError if it is missing or damaged, or lists no row or a row twice.
    """
    path = folder / ROWS_FILE
    try:
        listed: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        check_shape(listed, _ROWS, ROWS_FILE)
    except (OSError, ValueError, LoraqError) as error:
        raise LoraqError(
            f"Cannot read '{path}': {error}. Restore it, or run the experiment again."
        ) from None
    names = [row["row"] for row in listed["rows"]]
    if not names or len(set(names)) < len(names):
        raise LoraqError(
            f"'{path}' lists {'a row twice' if names else 'no rows'}. Restore it, or run the "
            "experiment again."
        )
    return listed


def record_path(output: Path, listed: Mapping[str, str]) -> Path:
    """Return the path of the record of a row that rows.json lists."""
    return output / "record" / listed["record"] / "record.json"


def read_product_record(path: Path) -> Record:
    """Read a record from the store; LoraqError if it does not match its manifest."""
    if path.is_file():
        check_product(path.parent, [path.name])
    return load_record(path)
