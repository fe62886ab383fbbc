"""Publish finished records: tables, pictures, W&B runs, and the text that is printed."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraq.results.experiment_folder import ROWS_FILE
from loraq.results.plots.diagrams import draw_diagrams
from loraq.results.plots.grid import image_grid
from loraq.results.plots.layer_errors import layer_error_map
from loraq.results.plots.still import what_is_shown
from loraq.results.record import Record
from loraq.results.tables.brief import brief_table
from loraq.results.tables.columns import summary_metrics, unit_of
from loraq.results.tables.tables import write_tables
from loraq.results.tables.text import to_markdown
from loraq.results.tracking import IMAGES, TrackedImage, Tracker
from loraq.runner.evaluate import image_set, reference_set
from loraq.runner.rows import Row, Stage
from loraq.runner.session import Session
from loraq.utils.files import ABANDONED, remove_temporaries, write_json, write_text
from loraq.utils.hashing import CHECKSUMS, file_hash, read_sha256sums
from loraq.utils.output_folder import folder_lock

PICTURE_PROMPTS = 8


@dataclass(frozen=True)
class Outcome:
    """An experiment's records, the folder of its tables, and the text that is printed."""

    records: list[Record]
    folder: Path
    text: str

    def __repr__(self) -> str:
        return f"Outcome({len(self.records)} records, folder='{self.folder}')"


def publish_results(
    session: Session, finished: Sequence[tuple[Row, Record]], folder: Path, started: float
) -> Outcome:
    """Write tables and pictures, log each record to W&B once, and compose the printed text."""
    records = [record for _, record in finished]
    config = finished[0][0].config
    baseline = config.baseline if config.baseline in {record.row for record in records} else None
    listed = [
        {"row": row.name, "record": row.keys[Stage.RECORD], "images": row.keys[Stage.IMAGES]}
        for row, _ in finished
    ]
    rows = {"baseline": baseline, "rows": listed}
    with session.timed("tables and pictures"), folder_lock(folder):
        remove_temporaries(folder, ABANDONED)
        changed = _previous_rows(folder) != rows
        write_tables(records, folder, baseline)
        pictures = _pictures(session, finished, folder, changed)
        write_json(folder / ROWS_FILE, rows)
    with session.timed("W&B"):
        runs, mode = _track(session, finished, pictures)
    images = session.store.path(*finished[-1][0].product(Stage.IMAGES))
    others = ", ".join([*_other_tables(folder), ".tex", ".csv"])
    lines = [
        to_markdown(brief_table(records, baseline)),
        f"Tables:  {folder}/main.md has all columns (also {others})",
        *(f"Picture: {path}" for path in pictures),
        f"{unit_of(records[-1]).capitalize() + ':':8} {images} (of the last row)",
        *([f"Report:  {_report_command(folder)}"] if folder.parent.name == "results" else []),
        *([f"W&B:     {len(runs)} runs in {runs[0].parent} ({mode})"] if runs else []),
        time_shares(session, started),
    ]
    return Outcome(records, folder, "\n".join(lines))


def _previous_rows(folder: Path) -> Any:
    """The content of `rows.json` of an earlier run, None if it cannot be read."""
    try:
        return json.loads((folder / ROWS_FILE).read_text())
    except (OSError, ValueError):
        return None


def _other_tables(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.md") if path.name != "main.md")


def _report_command(folder: Path) -> str:
    output = folder.parent.parent
    elsewhere = "" if output == Path("outputs") else f" --output {output}"
    return f"loraq report {folder.name}{elsewhere}"


def _pictures(
    session: Session, finished: Sequence[tuple[Row, Record]], folder: Path, changed: bool
) -> list[Path]:
    """Paths of the image grid and the diagrams.

    They are drawn again only if the rows have changed, or a picture does not match SHA256SUMS.
    """
    grid, errors = folder / "grid.png", folder / "layer_errors.png"
    if changed or not _as_drawn(folder, grid.name):
        sets = [image_set(session.store, row) for row, _ in finished]
        shown = range(min(PICTURE_PROMPTS, *(len(images) for images in sets)))
        image_grid(
            [record.label for _, record in finished],
            [[images.paths[place] for place in shown] for images in sets],
            [finished[0][0].prompts[place].prompt for place in shown],
            grid,
            notes=[_decibels(record) for _, record in finished],
            caption=what_is_shown(len(shown), len(sets[0]), sets[0].paths[0]),
        )
        records = [record for _, record in finished]
        drawn = {grid, *draw_diagrams(records, folder)}
        if any(record.layers for record in records):
            drawn.add(layer_error_map(records, errors))
        for old in {*folder.glob("*.png")} - drawn:
            old.unlink()
        sums = [f"{file_hash(path)}  {path.name}\n" for path in sorted(drawn)]
        write_text(folder / CHECKSUMS, "".join(sums))
    return [grid, *sorted(path for path in folder.glob("*.png") if path != grid)]


def _as_drawn(folder: Path, needed: str) -> bool:
    """Whether `needed` and all other pictures match SHA256SUMS."""
    try:
        drawn = read_sha256sums(folder)
        return needed in drawn and all(file_hash(folder / n) == h for n, h in drawn.items())
    except (OSError, ValueError):
        return False


def _decibels(record: Record) -> str:
    """PSNR, or the signal-to-noise ratio of sound."""
    value = record.metrics.get(summary_metrics([record])[0], {}).get("value")
    return "" if value is None else f"{value:.1f} dB"


def _track(
    session: Session, finished: Sequence[tuple[Row, Record]], pictures: Sequence[Path]
) -> tuple[list[Path], str]:
    """Log one W&B run per row, and an overview run if there are at least three rows.

    Returns the folders of the runs and the mode in which they were written.
    """
    settings = finished[0][0].config.tracking
    if settings.mode == "disabled":
        return [], settings.mode
    tracker = Tracker(session.store.root, settings.mode, settings.project)
    runs = [tracker.record(record, _tracked_images(session, row)) for row, record in finished]
    if len(finished) > 2:
        runs.append(tracker.overview([record for _, record in finished], pictures))
    return [run for run in runs if run], tracker.mode


def _tracked_images(session: Session, row: Row) -> list[TrackedImage]:
    images = image_set(session.store, row)
    reference = None if row.recipe is None else reference_set(session.store, row)
    return [
        TrackedImage(
            images.names[place],
            row.prompts[place].prompt,
            images.paths[place],
            None if reference is None else reference.paths[place],
        )
        for place in range(min(IMAGES, len(images)))
    ]


def time_shares(session: Session, started: float) -> str:
    """The run's total time and the share of each kind of work."""
    total = time.perf_counter() - started
    shares = {**session.seconds, "everything else": total - sum(session.seconds.values())}
    parts = [f"{name} {seconds / total:.0%}" for name, seconds in shares.items()]
    return f"Time:    {total:.0f} s ({', '.join(parts)})"


def row_summary(record: Record) -> str:
    """Bits per weight and metrics of a finished row in one line."""
    bits = record.budget.get("bits_per_weight")
    words = [f"{bits:.3f} bits/weight"] if bits else []
    for name, metric in record.metrics.items():
        if metric.get("value") is not None:
            words.append(f"{name} {metric['value']:.4g}")
    return ", ".join(words)
