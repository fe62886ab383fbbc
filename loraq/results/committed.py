"""Committed results: the records of finished experiments under `results/`, and their tables.

    results/<experiment>/rows.json            which rows, in which order, compared with which one
    results/<experiment>/records/<row>.json   one record a row, as the run wrote it
    results/<experiment>/main.md …            tables, made from the records and never edited
    results/reported/*.csv                    numbers published by others (see its README)

`outputs/` is a workplace and stays out of git. What is to be kept is taken over from there:

    python -m loraq.results outputs/results/demo
    python -m loraq.results outputs/results/table1/rows/rtn     (one row, made again)

Reads records and nothing else: no torch, no images, no W&B.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from loraq.errors import LoraqError, unknown
from loraq.results.experiment_folder import ROWS_FILE, record_file
from loraq.results.plots.diagrams import draw
from loraq.results.record import Record, load
from loraq.results.tables.tables import write_tables
from loraq.utils.assets import CHECKOUT
from loraq.utils.files import write_bytes, write_json

RECORDS = "records"
REPORTED = "reported"


@dataclass(frozen=True)
class Results:
    """The committed records of one experiment, in the order of its rows."""

    name: str
    folder: Path
    records: list[Record]
    baseline: str | None


def result_names(root: Path = CHECKOUT) -> list[str]:
    """The experiments whose records are committed."""
    return sorted(path.parent.name for path in (root / "results").glob(f"*/{ROWS_FILE}"))


def read_results(name: str, root: Path = CHECKOUT) -> Results:
    """The experiment's records; LoraqError where one is missing, damaged or not the listed one."""
    if name not in result_names(root):
        raise unknown("committed experiment", name, result_names(root))
    folder = root / "results" / name
    listed = json.loads((folder / ROWS_FILE).read_text(encoding="utf-8"))
    records = []
    for row in listed["rows"]:
        record = load(folder / RECORDS / f"{row['row']}.json")
        if (record.row, record.key) != (row["row"], row["record"]):
            raise LoraqError(
                f"{folder / RECORDS}/{row['row']}.json is the record {record.key} of row "
                f"'{record.row}', and {ROWS_FILE} lists {row['record']}. Take the experiment over "
                f"again: python -m loraq.results outputs/results/{name}"
            )
        records.append(record)
    return Results(name, folder, records, listed["baseline"])


def take_over(source: Path, root: Path = CHECKOUT) -> Path:
    """Copy an experiment's records from OUTPUT/results/NAME, and write its tables beside them."""
    if not (source / ROWS_FILE).is_file():
        raise LoraqError(
            f"'{source}' has no {ROWS_FILE}, so no experiment has finished there. Give the folder "
            "that `loraq run` names after its table, such as outputs/results/demo."
        )
    if source.resolve().name == REPORTED:
        raise LoraqError(f"results/{REPORTED}/ is kept for published numbers; rename '{source}'.")
    rows = json.loads((source / ROWS_FILE).read_text(encoding="utf-8"))["rows"]
    output = source.resolve().parents[1]
    paths = {row["row"]: record_file(output, row) for row in rows}
    for path in paths.values():
        load(path)  # all are there and whole before anything is replaced
    target = root / "results" / source.resolve().name
    shutil.rmtree(target / RECORDS, ignore_errors=True)
    (target / RECORDS).mkdir(parents=True)
    for row, path in paths.items():
        write_bytes(target / RECORDS / f"{row}.json", path.read_bytes())
    write_bytes(target / ROWS_FILE, (source / ROWS_FILE).read_bytes())
    _finish(target, root)
    return target


def take_over_row(source: Path, root: Path = CHECKOUT) -> Path:
    """Put the rows of OUTPUT/results/NAME/rows/ROW in the place of NAME's committed ones.

    The 16-bit row, which such a run lists as well, stays the committed one.
    """
    target = root / "results" / source.resolve().parents[1].name
    listed = json.loads((target / ROWS_FILE).read_text(encoding="utf-8"))
    places = {row["row"]: place for place, row in enumerate(listed["rows"])}
    made = json.loads((source / ROWS_FILE).read_text(encoding="utf-8"))["rows"]
    for row in made:
        if row["row"] not in places:
            raise unknown(f"row of {target.name}", row["row"], places)
        path = record_file(source.resolve().parents[3], row)
        if not load(path).config.get("quant"):
            continue
        write_bytes(target / RECORDS / f"{row['row']}.json", path.read_bytes())
        listed["rows"][places[row["row"]]] = row
    write_json(target / ROWS_FILE, listed)
    _finish(target, root)
    return target


def _finish(target: Path, root: Path) -> None:
    """Tables and pictures of records that have just come."""
    refresh_tables(target.name, root)
    for old in target.glob("*.png"):
        old.unlink()
    draw(read_results(target.name, root).records, target)


def refresh_tables(name: str, root: Path = CHECKOUT, check: bool = False) -> list[Path]:
    """Make the experiment's tables anew; the files that were not what the records say.

    `check` only looks. A table that the records no longer give counts, and is removed.
    """
    found = read_results(name, root)
    with tempfile.TemporaryDirectory() as folder:
        fresh = write_tables(found.records, folder, found.baseline)
        wanted = {file: path.read_bytes() for file, path in fresh.items()}
    kinds = {Path(file).suffix for file in wanted}
    there = {path.name: path for path in found.folder.iterdir() if path.suffix in kinds}
    there.pop("README.md", None)
    stale = []
    for file in sorted({*wanted, *there}):
        path = found.folder / file
        if file in there and wanted.get(file) == path.read_bytes():
            continue
        stale.append(path)
        if check:
            continue
        if file in wanted:
            write_bytes(path, wanted[file])
        else:
            path.unlink()
    return stale


def find_results(name: str, root: Path) -> Results | None:
    """The experiment's records, None where none are committed yet; an unknown name raises."""
    if name in result_names(root):
        return read_results(name, root)
    planned = [path.stem for path in (root / "conf" / "experiment").glob("*.yaml")]
    if name.partition("-")[0] not in planned:
        raise unknown("experiment", name, [*planned, *result_names(root)])
    return None


def not_yet(name: str) -> str:
    """What stands where a table will be."""
    experiment, _, model = name.partition("-")
    command = f"loraq run experiment={experiment}" + (f" model={model}" if model else "")
    return f"*Not yet measured: no records of `{name}` are committed. `{command}` makes them.*"


def changed_checkouts(found: Results) -> list[str]:
    """Rows whose record was made from code with uncommitted changes (`commit` ends with `+`)."""
    return [record.row for record in found.records if record.commit.endswith("+")]
