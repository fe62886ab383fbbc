"""Where a report's records and images lie: an experiment that was run, or one that is committed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.errors import LoraqError, unknown
from loraq.results.committed import read_results, result_names
from loraq.results.experiment_folder import ROWS_FILE, finished_experiments, read_experiment
from loraq.results.record import Record


@dataclass(frozen=True)
class Source:
    """Records in the order of their rows, and the folder of each row's images (it may be gone)."""

    name: str
    records: list[Record]
    baseline: str | None
    images: Mapping[str, Path]
    committed: bool

    def chosen(self, rows: Sequence[str] | None) -> list[Record]:
        """`rows`, or: the 16-bit model, RTN, the baseline, and the two nearest to 16 bits."""
        by_row = {record.row: record for record in self.records}
        if rows is not None:
            for row in rows:
                if row not in by_row:
                    raise unknown("row", row, by_row)
            return [by_row[row] for row in rows]
        measured = [r for r in self.records if r.metrics.get("psnr", {}).get("value") is not None]
        best = sorted(measured, key=lambda r: -r.metrics["psnr"]["value"])[:2]
        wanted = ["reference", "rtn", self.baseline, *(record.row for record in best)]
        return [by_row[row] for row in dict.fromkeys(wanted) if row in by_row]

    def columns(self, shown: Sequence[Record]) -> list[tuple[Record, Path]]:
        """The rows with their images' folders; empty where a folder is not there (any more)."""
        found = [(r, self.images[r.row]) for r in shown if r.row in self.images]
        whole = len(found) == len(shown) and all(folder.is_dir() for _, folder in found)
        return found if whole else []


def located(folder: Path) -> Path:
    """`folder`; or NAME-HASH beside it, where NAME was run with one set of other settings only."""
    if (folder / ROWS_FILE).is_file() or folder.name in result_names():
        return folder
    there = [path.parent for path in folder.parent.glob(f"{folder.name}-*/{ROWS_FILE}")]
    return there[0] if len(there) == 1 else folder


def find_source(folder: Path) -> Source:
    """The experiment of OUTPUT/results/NAME; the committed one where it was not run."""
    name, output = folder.name, folder.resolve().parents[1]
    committed = not (folder / ROWS_FILE).is_file()
    if not committed:
        listed, records = read_experiment(output, name)
        baseline = listed["baseline"]
    elif name in result_names():
        found = read_results(name)
        records, baseline = found.records, found.baseline
        listed = json.loads((found.folder / ROWS_FILE).read_text(encoding="utf-8"))
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
