"""The summary table: memory and two metrics of each row, and its paired differences.

The metrics are PSNR and LPIPS, of clips of sound SNR and the distance of spectra.
"""

from __future__ import annotations

from collections.abc import Sequence

from loraq.results.record import Record
from loraq.results.tables.columns import (
    bits_cell,
    column_titles,
    metric_cell,
    row_label,
    summary_metrics,
    unit_of,
)
from loraq.results.tables.tables import (
    compare_rows,
    find_row,
    has_per_image,
    main_notes,
    main_table,
    paired_notes,
    paired_title,
)
from loraq.results.tables.text import Cell, Item, Table

BASELINE = Cell(reason="baseline of the paired differences")


def brief_table(records: Sequence[Record], baseline: str | None) -> Table:
    """Bits per weight, the two metrics and their paired differences to the baseline, per row.

    Without a baseline, or if it lacks per-image values of these metrics: the main table.
    """
    base = find_row(records, baseline) if baseline else None
    names = summary_metrics(records)
    paired = base is not None and all(has_per_image(base, name) for name in names)
    if base is None or len(records) < 2 or not paired:
        return main_table(records, baseline)
    others = [record for record in records if record is not base]
    differences = {name: compare_rows(others, base, name) for name in names}
    rows: list[list[Item]] = []
    for record in records:
        unit = unit_of(record)
        values = [metric_cell(record.metrics.get(name), name, unit) for name in names]
        compared = [differences[name].get(record.row, BASELINE) for name in names]
        rows.append([row_label(record), bits_cell(record, base), *values, *compared])
    titles = column_titles(records, names)
    columns = ["row", "bits/weight", *titles, *(f"Δ {title}" for title in titles)]
    notes = list(dict.fromkeys([*main_notes(records, base), *paired_notes(base)]))
    title = paired_title(base)
    return Table(f"Results, and {title[0].lower()}{title[1:]}", columns, rows, notes)
