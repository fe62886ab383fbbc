"""Tables of records: results with intervals, seen and held-out captions, paired differences.

Reads only records: no torch, no images, no W&B.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from loraq.errors import LoraqError, unknown
from loraq.metrics.common import intervals
from loraq.results.record import Record, load_record
from loraq.results.tables.columns import (
    EQUAL_MEMORY,
    bits_cell,
    column_titles,
    layer_cell,
    metric_cell,
    metric_column,
    metric_names,
    row_label,
    summary_metrics,
    unit_of,
)
from loraq.results.tables.computed_by import computed_by_notes
from loraq.results.tables.text import Cell, Item, Table, to_csv, to_latex, to_markdown
from loraq.utils.files import write_text
from loraq.utils.kinds import BLANK

SIGNIFICANCE = 0.05  # level of a family of claims, after Holm's correction
_A_MODEL = "derived from a model of the weights; no sampling, so no interval"


def load_records(paths: Sequence[str | os.PathLike[str]]) -> list[Record]:
    """Read the records at `paths`; of a folder, all *.json files in the order of their names."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise LoraqError(f"No records in {[str(path) for path in paths]}. Run an experiment first.")
    return [load_record(path) for path in files]


def main_table(records: Sequence[Record], baseline: str | None = None) -> Table:
    """Memory, errors and metrics of every row; `=` marks the memory of the row `baseline`."""
    names = metric_names(records)
    base = find_row(records, baseline) if baseline else None
    columns = ["row", "N", "bits/weight", "branch rank", "bytes", "weight err", "output err"]
    rows: list[list[Item]] = []
    for record in records:
        unit = unit_of(record)
        entries = [metric_cell(record.metrics.get(name), name, unit) for name in names]
        errors = [layer_cell(record, name) for name in ("weight_error", "output_error")]
        rank = record.budget.get("rank")
        stored = record.budget.get("nbytes")
        front: list[Item] = [
            row_label(record),
            _size(record),
            bits_cell(record, base),
            "–" if rank is None else str(rank),
            "–" if stored is None else int(stored),
        ]
        rows.append([*front, *errors, *entries])
    notes = [*main_notes(records, base), *computed_by_notes(records)]
    return Table("Results", columns + column_titles(records, names), rows, notes)


def main_notes(records: Sequence[Record], base: Record | None) -> list[str]:
    """Return the notes of the main table: prompts, equal memory, identical images."""
    notes = [_split_sizes(records), *_kind_notes(records), *_memory_note(base)]
    return [*notes, *_one_colour(records), *_identical(records)]


def splits_table(records: Sequence[Record]) -> Table:
    """Metrics on captions that the model was trained on (seen) and on all others (held out)."""
    names = metric_names(records)
    rows: list[list[Item]] = []
    for record in filter(lambda record: _seen(record) is not None, records):
        for part, title in (("seen", "seen"), ("held_out", "held out")):
            entries = {name: record.metrics.get(name, {}).get(part) for name in names}
            if sizes := [entry["n"] for entry in entries.values() if entry]:
                cells = [metric_cell(entries[name], name, unit_of(record)) for name in names]
                rows.append([row_label(record), title, max(sizes), *cells])
    columns = ["row", "captions", "N", *column_titles(records, names)]
    return Table("Seen and held-out captions", columns, rows)


def paired_table(records: Sequence[Record], baseline: str) -> Table:
    """Mean of (row − baseline) over the same prompts, for every metric with per-image values.

    A cell is marked better or worse only if there are enough prompts for a verdict, the 95 %
    interval excludes 0 *and* the claim survives Holm's correction over the rows of its column.
    """
    base = find_row(records, baseline)
    others = [record for record in records if record is not base]
    names = [name for name in metric_names(records) if has_per_image(base, name)]
    compared = {name: compare_rows(others, base, name) for name in names}
    columns = [
        "row",
        "N",
        "bits/weight",
        *(f"Δ {title}" for title in column_titles(records, names)),
    ]
    rows: list[list[Item]] = []
    for record in others:
        cells = [compared[name][record.row] for name in names]
        rows.append([row_label(record), _size(record), bits_cell(record, base), *cells])
    return Table(paired_title(base), columns, rows, paired_notes(base))


def paired_title(base: Record) -> str:
    return f"Paired differences to {row_label(base)}"


def paired_notes(base: Record) -> list[str]:
    """Return the notes of the paired table: the test and the correction, equal memory."""
    verdict = intervals.too_few(_size(base), intervals.SMALLEST_VERDICT, "a verdict") or (
        "better or worse: the interval excludes 0 and the claim survives Holm's correction "
        f"(family: the rows of the column, level {SIGNIFICANCE:g})"
    )
    means = f"mean of (row − {row_label(base)}) over the same prompts, 95 % interval. {verdict}"
    return [means.replace("images", unit_of(base)), *_memory_note(base)]


def limits_table(records: Sequence[Record]) -> Table:
    """Weight errors and their rate–distortion references at the same bits per weight."""
    names = ("gaussian", "shannon", "spectral")
    rows: list[list[Item]] = []
    for record in records:
        if found := record.analyses.get("limits"):
            cells = [Cell(found[name], digits=4, reason=_A_MODEL) for name in names]
            error = layer_cell(record, "weight_error")
            rows.append([row_label(record), bits_cell(record, None), error, *cells])
    columns = ["row", "bits/weight", "weight err", "Gaussian D(R)", "Shannon bound", "spectral"]
    notes = [
        "relative to the norm of W, mean over the layers. Gaussian D(R): independent Gaussian "
        "weights. Shannon bound: independent weights with the layer's distribution, from its "
        "entropy. spectral: water-filling over the singular values; the singular vectors cost no "
        "bits"
    ]
    return Table("Weight errors and rate–distortion references", columns, rows, notes)


def all_tables(records: Sequence[Record], baseline: str | None = None) -> dict[str, Table]:
    """Return name → table: main; splits and limits if not empty; paired if there is a baseline."""
    tables = {"main": main_table(records, baseline)}
    splits = splits_table(records)
    if splits.rows:
        tables["splits"] = splits
    limits = limits_table(records)
    if limits.rows:
        tables["limits"] = limits
    if baseline and len(records) > 1:
        tables["paired"] = paired_table(records, baseline)
    return tables


def render_tables(records: Sequence[Record], baseline: str | None = None) -> dict[str, str]:
    """Return file name → text: <name>.md, .tex and .csv of all tables."""
    renderers = (("md", to_markdown), ("tex", to_latex), ("csv", to_csv))
    return {
        f"{name}.{suffix}": render(table)
        for name, table in all_tables(records, baseline).items()
        for suffix, render in renderers
    }


def write_tables(
    records: Sequence[Record], folder: str | os.PathLike[str], baseline: str | None = None
) -> dict[str, Path]:
    """Write the files of `render_tables` to `folder`; returns file name → path."""
    folder = Path(folder)
    paths: dict[str, Path] = {}
    for name, text in render_tables(records, baseline).items():
        paths[name] = folder / name
        write_text(paths[name], text)
    return paths


def find_row(records: Sequence[Record], row: str) -> Record:
    """Return the record of a row; LoraqError for an unknown row."""
    for record in records:
        if record.row == row:
            return record
    raise unknown("row", row, [record.row for record in records])


def compare_rows(others: Sequence[Record], base: Record, name: str) -> dict[str, Cell]:
    """Return row → paired difference to `base` in one metric; Holm's correction over the rows."""
    shown = metric_column(name)
    direction = base.metrics[name].get("direction")
    found = {
        record.row: intervals.differences(*_same_prompts(record, base, name))
        for record in others
        if has_per_image(record, name)
    }
    cells = {record.row: Cell(reason="not measured for this row") for record in others}
    if not found:
        return cells
    p_values = intervals.paired_p_values(np.stack(list(found.values()), axis=1))
    adjusted = intervals.holm(dict(zip(found, map(float, p_values), strict=True)))
    for row, values in found.items():
        difference, claim = intervals.mean_interval(values), ""
        if difference.excludes_zero and adjusted[row] <= SIGNIFICANCE:
            claim = "better" if (difference.mean > 0) == (direction == "higher") else "worse"
        reason = intervals.too_few(len(values)).replace("images", unit_of(base))
        cells[row] = Cell(*difference, shown.digits, shown.scale, reason, claim, True)
    return cells


def _same_prompts(record: Record, base: Record, name: str) -> tuple[list[float], list[float]]:
    own, reference = record.images.get("names"), base.images.get("names")
    if own != reference:
        raise LoraqError(
            f"rows {record.row!r} ({len(own or [])} prompts) and {base.row!r} "
            f"({len(reference or [])} prompts) were not measured on the same prompts in the same "
            "order; run both with the same data.split and data.count"
        )
    return record.metrics[name]["per_image"], base.metrics[name]["per_image"]


def has_per_image(record: Record, name: str) -> bool:
    """Whether the record has per-image values of a metric."""
    return bool(record.metrics.get(name, {}).get("per_image"))


def _size(record: Record) -> int:
    return len(record.images.get("names", ()))


def _memory_note(base: Record | None) -> list[str]:
    bits = base.budget.get("bits_per_weight") if base is not None else None
    if base is None or bits is None:
        return []
    return [f"`=`: bits per weight within {EQUAL_MEMORY:.0%} of {row_label(base)} ({bits:.3f})"]


def _split_sizes(records: Sequence[Record]) -> str:
    sizes, known = {_size(r) for r in records}, {_seen(r) for r in records}
    if len(sizes) > 1:
        return "rows differ in N: Fréchet distances are not comparable across N"
    total = sizes.pop() if sizes else 0
    seen = known.pop() if len(known) == 1 else None  # of a saved pipeline's row it is not known
    if seen in (None, total):  # published prompt sets do not mark seen captions
        return f"N = {total} prompts"
    return f"N = {total} prompts ({seen} seen in training, {total - seen} held out)"


def _seen(record: Record) -> int | None:
    """How many captions were in the model's training; None if they do not say it of this model.

    Those of the package say it of the models in the package.
    """
    captions = str(record.config.get("data", {}).get("captions")).startswith("asset:")
    model = str(record.config.get("model", {}).get("path")).startswith("asset:")
    return None if captions and not model else sum(map(bool, record.images.get("seen") or ()))


def _kind_notes(records: Sequence[Record]) -> list[str]:
    """Return what the outputs are if they are not images: frames and rate, or seconds."""
    about = records[0].images if records else {}
    kind = about.get("kind", "image")
    if kind == "video":
        rate = f" at {about['fps']:g} frames per second" if about.get("fps") else ""
        length = f" of {about['frames']} frames{rate}" if about.get("frames") else ""
        return [f"N counts videos{length}; values are means over the frames of each video"]
    if kind == "audio":
        length = f"{about['seconds']:g} s, {about['rate']} samples per second"
        return [f"N counts clips of sound of {length}, channels: {about['channels']}"]
    return []


def _one_colour(records: Sequence[Record]) -> list[str]:
    """Return a note for each row with images of one colour, which a failed model makes."""
    return [
        f"{row_label(record)}: {len(blank)} of {_size(record)} {unit_of(record)} "
        f"{BLANK[record.images.get('kind', 'image')]} "
        f"({', '.join(blank[:3])}{' …' if len(blank) > 3 else ''}); scores of these mean nothing"
        for record in records
        if (blank := record.images.get("one_colour"))
    ]


def _identical(records: Sequence[Record]) -> list[str]:
    """Return a note on the cap for each row with images identical to the 16-bit model's."""
    notes = []
    for record in records:
        name = summary_metrics([record])[0]
        details = record.metrics.get(name, {}).get("details", {})
        if count := details.get("identical"):
            unit, total = unit_of(record), str(_size(record))
            if record.images.get("kind") == "video":  # PSNR counts frames
                frames = record.images.get("frames")
                unit, total = "frames", str(_size(record) * frames) if frames else "all"
            why = "the largest finite one" if name == "psnr" else "the precision of float32"
            notes.append(
                f"{row_label(record)}: {count} of {total} {unit} are identical to the "
                f"16-bit model's; their infinite {metric_column(name).title} counts as "
                f"{details['cap']:.1f} dB, {why}"
            )
    return notes
