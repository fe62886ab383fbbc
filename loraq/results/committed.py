"""Committed results: the records of finished experiments under `results/`, and their tables.

    results/<experiment>/rows.json            the rows, their order and their baseline
    results/<experiment>/records/<row>.json   one record per row, as the run wrote it
    results/<experiment>/main.md …            tables made from the records, never edited by hand
    results/reported/*.csv                    numbers published by others (see its README)

`outputs/` is not in git. To keep an experiment, or one row that was run again, import it:

    python -m loraq.results outputs/results/demo
    python -m loraq.results outputs/results/table1/rows/rtn

Reads only records: no torch, no images, no W&B.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from loraq.errors import LoraqError, unknown
from loraq.results.experiment_folder import (
    ROWS_FILE,
    read_product_record,
    read_rows,
    record_path,
)
from loraq.results.plots.diagrams import draw_diagrams
from loraq.results.record import Record, load_record
from loraq.results.tables.tables import render_tables
from loraq.utils.assets import CHECKOUT
from loraq.utils.files import write_bytes, write_json

RECORDS = "records"
REPORTED = "reported"


@dataclass(frozen=True)
class Results:
    """The committed records of one experiment, in the order of its rows.

    baseline: the row that the others are compared with, if any.
    """

    name: str
    folder: Path
    records: list[Record]
    baseline: str | None

    def __repr__(self) -> str:
        count = len(self.records)
        return f"Results({self.name!r}, {count} records, baseline={self.baseline!r})"


def result_names(root: Path = CHECKOUT) -> list[str]:
    """Return the sorted names of the experiments with committed records."""
    return sorted(path.parent.name for path in (root / "results").glob(f"*/{ROWS_FILE}"))


def read_results(name: str, root: Path = CHECKOUT) -> Results:
    """Read an experiment; LoraqError if a record is missing, damaged or not the listed one."""
    if name not in result_names(root):
        raise unknown("committed experiment", name, result_names(root))
    folder = root / "results" / name
    listed = read_rows(folder)
    records = []
    for row in listed["rows"]:
        record = load_record(folder / RECORDS / f"{row['row']}.json")
        if (record.row, record.key) != (row["row"], row["record"]):
            raise LoraqError(
                f"{folder / RECORDS}/{row['row']}.json is the record {record.key} of row "
                f"'{record.row}', but {ROWS_FILE} lists {row['record']}. Import the experiment "
                f"again: python -m loraq.results outputs/results/{name}"
            )
        records.append(record)
    return Results(name, folder, records, listed["baseline"])


def import_experiment(source: Path, root: Path = CHECKOUT) -> Path:
    """Copy the records of OUTPUT/results/NAME to results/NAME, write its tables and plots there."""
    if not (source / ROWS_FILE).is_file():
        raise LoraqError(
            f"'{source}' has no {ROWS_FILE}, so it holds no finished experiment. Give the folder "
            "that `loraq run` prints below its table, such as outputs/results/demo."
        )
    if source.resolve().name == REPORTED:
        raise LoraqError(
            f"results/{REPORTED}/ is reserved for published numbers; rename '{source}'."
        )
    rows = read_rows(source)["rows"]
    output = source.resolve().parents[1]
    paths = {row["row"]: record_path(output, row) for row in rows}
    for path in paths.values():
        read_product_record(
            path
        )  # fails on a missing or damaged record before anything is replaced
    target = root / "results" / source.resolve().name
    copies = {target / RECORDS / f"{row}.json": path for row, path in paths.items()}
    for copy, path in copies.items():
        write_bytes(copy, path.read_bytes())
    for old in {*(target / RECORDS).iterdir()} - copies.keys():
        old.unlink(missing_ok=True)
    write_bytes(target / ROWS_FILE, (source / ROWS_FILE).read_bytes())
    _refresh(target, root)
    return target


def import_row(source: Path, root: Path = CHECKOUT) -> Path:
    """Replace committed rows of NAME by those of OUTPUT/results/NAME/rows/ROW.

    Such a run also lists the 16-bit row; the committed 16-bit row stays.
    """
    target = root / "results" / source.resolve().parents[1].name
    listed = read_rows(target)
    places = {row["row"]: place for place, row in enumerate(listed["rows"])}
    made = read_rows(source)["rows"]
    for row in made:
        if row["row"] not in places:
            raise unknown(f"row of {target.name}", row["row"], places)
        path = record_path(source.resolve().parents[3], row)
        if not read_product_record(path).config.get("quant"):
            continue
        write_bytes(target / RECORDS / f"{row['row']}.json", path.read_bytes())
        listed["rows"][places[row["row"]]] = row
    write_json(target / ROWS_FILE, listed)
    _refresh(target, root)
    return target


def _refresh(target: Path, root: Path) -> None:
    """Rebuild the tables and plots of records that were just imported."""
    refresh_tables(target.name, root)
    for old in target.glob("*.png"):
        old.unlink(missing_ok=True)
    draw_diagrams(read_results(target.name, root).records, target)


def refresh_tables(name: str, root: Path = CHECKOUT, check: bool = False) -> list[Path]:
    """Rebuild an experiment's tables from its records; returns the files that were out of date.

    A table that the records no longer produce is out of date and is deleted. With `check`, nothing
    is written or deleted.
    """
    found = read_results(name, root)
    wanted = {
        file: text.encode("utf-8")
        for file, text in render_tables(found.records, found.baseline).items()
    }
    suffixes = {Path(file).suffix for file in wanted}
    existing = {path.name: path for path in found.folder.iterdir() if path.suffix in suffixes}
    existing.pop("README.md", None)
    stale = []
    for file in sorted({*wanted, *existing}):
        path = found.folder / file
        if file in existing and wanted.get(file) == path.read_bytes():
            continue
        stale.append(path)
        if check:
            continue
        if file in wanted:
            write_bytes(path, wanted[file])
        else:
            path.unlink(missing_ok=True)
    return stale


def find_results(name: str, root: Path) -> Results | None:
    """Return the experiment, or None if it is not committed yet; LoraqError for an unknown name."""
    if name in result_names(root):
        return read_results(name, root)
    planned = [path.stem for path in (root / "conf" / "experiment").glob("*.yaml")]
    if name.partition("-")[0] not in planned:
        raise unknown("experiment", name, [*planned, *result_names(root)])
    return None


def not_measured_text(name: str) -> str:
    """Return the placeholder for a table whose experiment has no committed records."""
    experiment, _, model = name.partition("-")
    command = f"loraq run experiment={experiment}" + (f" model={model}" if model else "")
    return f"*Not yet measured: no records of `{name}` are committed. `{command}` makes them.*"


def rows_from_changed_code(found: Results) -> list[str]:
    """Return the rows that were run from code with uncommitted changes (`commit` ends in `+`)."""
    return [record.row for record in found.records if record.commit.endswith("+")]
