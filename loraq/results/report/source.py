"""Records and images of a report: from a run, or from the committed results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.errors import LoraqError, unknown
from loraq.results.committed import read_results, result_names
from loraq.results.experiment_folder import (
    ROWS_FILE,
    finished_experiments,
    read_experiment,
    read_rows,
)
from loraq.results.record import Record
from loraq.results.tables.columns import summary_metrics


@dataclass(frozen=True)
class Source:
    """The records of an experiment in the order of its rows.

    images: row → folder of its images, which may no longer exist. committed: whether the records
    are committed ones.
    """

    name: str
    records: list[Record]
    baseline: str | None
    images: Mapping[str, Path]
    committed: bool

    def __repr__(self) -> str:
        kind = "committed" if self.committed else "run"
        return f"Source({self.name!r}, {len(self.records)} records, {kind})"

    def select(self, rows: Sequence[str] | None) -> list[Record]:
        """Return `rows`; by default the 16-bit model, RTN, the baseline, the two of highest PSNR.

        LoraqError for an unknown row.
        """
        by_row = {record.row: record for record in self.records}
        if rows is not None:
            for row in rows:
                if row not in by_row:
                    raise unknown("row", row, by_row)
            return [by_row[row] for row in rows]
        name = summary_metrics(self.records)[0]
        measured = [r for r in self.records if r.metrics.get(name, {}).get("value") is not None]
        best = sorted(measured, key=lambda r: -r.metrics[name]["value"])[:2]
        wanted = ["reference", "rtn", self.baseline, *(record.row for record in best)]
        return [by_row[row] for row in dict.fromkeys(wanted) if row in by_row]

    def image_folders(self, shown: Sequence[Record]) -> list[tuple[Record, Path]]:
        """Return the rows with the folders of their images; empty if a folder is missing."""
        found = [(r, self.images[r.row]) for r in shown if r.row in self.images]
        complete = len(found) == len(shown) and all(folder.is_dir() for _, folder in found)
        return found if complete else []


def locate_experiment(folder: Path) -> Path:
    """Return `folder`, or the only NAME-HASH next to it (a run with non-default settings)."""
    if (folder / ROWS_FILE).is_file() or folder.name in result_names():
        return folder
    variants = [path.parent for path in folder.parent.glob(f"{folder.name}-*/{ROWS_FILE}")]
    return variants[0] if len(variants) == 1 else folder


def find_source(folder: Path) -> Source:
    """Return the experiment of OUTPUT/results/NAME, else the committed one; LoraqError if none."""
    name, output = folder.name, folder.resolve().parents[1]
    committed = not (folder / ROWS_FILE).is_file()
    if not committed:
        listed, records = read_experiment(output, name)
        baseline = listed["baseline"]
    elif name in result_names():
        found = read_results(name)
        records, baseline = found.records, found.baseline
        listed = read_rows(found.folder)
    else:
        raise unknown("experiment", name, dict.fromkeys([*_finished(output), *result_names()]))
    keys = {row["row"]: row.get("images") for row in listed["rows"]}
    images = {row: output / "images" / key for row, key in keys.items() if key}
    return Source(name, records, baseline, images, committed)


def _finished(output: Path) -> list[str]:
    try:
        return finished_experiments(output)
    except LoraqError:
        return []
