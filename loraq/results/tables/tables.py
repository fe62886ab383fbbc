"""Records → tables: every row with its intervals, seen and held-out apart, paired differences.

Reads records and nothing else: no torch, no images, no W&B.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from loraq.errors import LoraqError, unknown
from loraq.metrics.common import bootstrap
from loraq.results.record import Record, load
from loraq.results.tables.columns import (
    EQUAL_MEMORY,
    bits_cell,
    column,
    layer_cell,
    metric_cell,
    metric_names,
    titles,
)
from loraq.results.tables.text import Cell, Item, Table, to_csv, to_latex, to_markdown

SIGNIFICANCE = 0.05  # of a family of claims, after Holm
_A_MODEL = "a statement about a model of the weights: no sampling, no interval"


def load_records(paths: Sequence[str | os.PathLike[str]]) -> list[Record]:
    """Records of the files given; a folder stands for its *.json files in name order."""
    files: list[Path] = []
    for path in map(Path, paths):
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise LoraqError(f"no records in {[str(path) for path in paths]}; run an experiment first")
    return [load(path) for path in files]


def main_table(records: Sequence[Record], baseline: str | None = None) -> Table:
    """Every row: budget, errors, metrics. `baseline` names the row that memory is compared with."""
    names = metric_names(records)
    base = find_row(records, baseline) if baseline else None
    columns = ["row", "N", "bits/weight", "branch rank", "bytes", "weight err", "output err"]
    rows: list[list[Item]] = []
    for record in records:
        entries = [metric_cell(record.metrics.get(name), name) for name in names]
        errors = [layer_cell(record, name) for name in ("weight_error", "output_error")]
        rank = record.budget.get("rank")
        stored = record.budget.get("nbytes")
        front: list[Item] = [
            *(record.label or record.row, _size(record), bits_cell(record, base)),
            *("–" if rank is None else str(rank), "–" if stored is None else int(stored)),
        ]
        rows.append([*front, *errors, *entries])
    notes = [_split_sizes(records), *_memory_note(base), *_identical(records)]
    return Table("Results", columns + titles(records, names), rows, list(filter(None, notes)))


def splits_table(records: Sequence[Record]) -> Table:
    """Captions the model was trained on (seen) and captions it never saw (held out), apart."""
    names = metric_names(records)
    rows: list[list[Item]] = []
    for record in records:
        for part, title in (("seen", "seen"), ("held_out", "held out")):
            entries = {name: record.metrics.get(name, {}).get(part) for name in names}
            if sizes := [entry["n"] for entry in entries.values() if entry]:
                cells = [metric_cell(entries[name], name) for name in names]
                rows.append([record.label or record.row, title, max(sizes), *cells])
    columns = ["row", "captions", "N", *titles(records, names)]
    return Table("Seen and held-out captions apart", columns, rows)


def paired_table(records: Sequence[Record], baseline: str, samples: int = 2000) -> Table:
    """row − baseline over the same prompts for every per-image metric, with better or worse.

    Said only where the 95 % interval of the difference excludes 0 *and* the claim survives Holm's
    correction over the rows of that column.
    """
    base = find_row(records, baseline)
    others = [record for record in records if record is not base]
    names = [name for name in metric_names(records) if _per_image(base, name)]
    compared = {name: _compare(others, base, name, samples) for name in names}
    columns = ["row", "N", "bits/weight", *(f"Δ {title}" for title in titles(records, names))]
    rows: list[list[Item]] = []
    for record in others:
        cells = [compared[name][record.row] for name in names]
        rows.append([record.label or record.row, _size(record), bits_cell(record, base), *cells])
    notes = [
        f"mean of (row − {_name(base)}) over the same prompts, bootstrap 95 % interval. better or "
        "worse: the interval excludes 0 and the claim survives Holm's correction "
        f"(family: the rows of the column, level {SIGNIFICANCE:g})",
        *_memory_note(base),
    ]
    return Table(f"Paired differences to {_name(base)}", columns, rows, notes)


def limits_table(records: Sequence[Record]) -> Table:
    """Weight errors beside how small they can get at the same stored bits (`distortion`)."""
    names = ("gaussian", "shannon", "spectral")
    rows: list[list[Item]] = []
    for record in records:
        if found := record.analyses.get("limits"):
            cells = [Cell(found[name], digits=4, reason=_A_MODEL) for name in names]
            error = layer_cell(record, "weight_error")
            rows.append([record.label or record.row, bits_cell(record, None), error, *cells])
    columns = ["row", "bits/weight", "weight err", "Gaussian D(R)", "Shannon bound", "spectral"]
    notes = [
        "relative to the norm of W, mean over the layers. Gaussian D(R): independent Gaussian "
        "weights. Shannon bound: independent weights of their own distribution, by its entropy. "
        "spectral: water-filling over the singular values, whose directions it has for nothing"
    ]
    return Table("Weight errors and rate–distortion references", columns, rows, notes)


def all_tables(records: Sequence[Record], baseline: str | None = None) -> dict[str, Table]:
    """name → table: main; splits, limits (where there are any); paired (with a baseline)."""
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


def write_tables(
    records: Sequence[Record], folder: str | os.PathLike[str], baseline: str | None = None
) -> dict[str, Path]:
    """Write <name>.md, .tex and .csv of all tables to `folder`; returns file name → path."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written: dict[str, Path] = {}
    for name, table in all_tables(records, baseline).items():
        for suffix, render in (("md", to_markdown), ("tex", to_latex), ("csv", to_csv)):
            path = folder / f"{name}.{suffix}"
            beside = path.with_suffix(f".{suffix}.tmp")
            beside.write_text(render(table), encoding="utf-8")
            os.replace(beside, path)
            written[path.name] = path
    return written


def find_row(records: Sequence[Record], row: str) -> Record:
    for record in records:
        if record.row == row:
            return record
    raise unknown("row", row, [record.row for record in records])


def _compare(others: Sequence[Record], base: Record, name: str, samples: int) -> dict[str, Cell]:
    """row → cell of its paired difference to `base` in one metric; Holm over these rows."""
    shown = column(name)
    direction = base.metrics[name].get("direction")
    differences: dict[str, bootstrap.Interval] = {}
    p_values: dict[str, float] = {}
    for record in others:
        if _per_image(record, name):
            own, reference = _same_prompts(record, base, name)
            tested = bootstrap.paired_test(own, reference, samples)
            differences[record.row], p_values[record.row] = tested
    adjusted = bootstrap.holm(p_values)
    cells = {record.row: Cell(reason="not measured for this row") for record in others}
    for row, difference in differences.items():
        claim = ""
        if difference.excludes_zero and adjusted[row] <= SIGNIFICANCE:
            claim = "better" if (difference.mean > 0) == (direction == "higher") else "worse"
        cells[row] = Cell(
            *difference, shown.digits, shown.scale, "one prompt allows no interval", claim, True
        )
    return cells


def _same_prompts(record: Record, base: Record, name: str) -> tuple[list[float], list[float]]:
    own, reference = record.images.get("names"), base.images.get("names")
    if own != reference:
        raise LoraqError(
            f"rows {record.row!r} ({len(own or [])} prompts) and {base.row!r} "
            f"({len(reference or [])} prompts) were not measured on the same prompts in the same "
            "order; run both with one data.split and data.count"
        )
    return record.metrics[name]["per_image"], base.metrics[name]["per_image"]


def _per_image(record: Record, name: str) -> bool:
    return bool(record.metrics.get(name, {}).get("per_image"))


def _name(record: Record) -> str:
    return record.label or record.row


def _size(record: Record) -> int:
    return len(record.images.get("names", ()))


def _memory_note(base: Record | None) -> list[str]:
    bits = base.budget.get("bits_per_weight") if base is not None else None
    if base is None or bits is None:
        return []
    return [f"`=`: bits per weight within {EQUAL_MEMORY:.0%} of {_name(base)} ({bits:.3f})"]


def _split_sizes(records: Sequence[Record]) -> str:
    sizes = {(_size(r), sum(map(bool, r.images.get("seen") or ()))) for r in records}
    if len(sizes) > 1:
        return "rows differ in N: Fréchet distances are not comparable across N"
    total, seen = sizes.pop() if sizes else (0, 0)
    if seen == total:  # as in published sets, which do not tell
        return f"N = {total} prompts"
    return f"N = {total} prompts ({seen} seen in training, {total - seen} held out)"


def _identical(records: Sequence[Record]) -> list[str]:
    """What PSNR's cap did: images equal to the 16-bit model's in every bit."""
    notes = []
    for record in records:
        details = record.metrics.get("psnr", {}).get("details", {})
        if count := details.get("identical"):
            cap = details["cap"]
            notes.append(
                f"{_name(record)}: {count} of {_size(record)} images are identical to the 16-bit "
                f"model's; their infinite PSNR counts as {cap:.1f} dB, the largest finite one"
            )
    return notes
