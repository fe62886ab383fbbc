"""The few columns that are read first, and the paired differences beside them."""

from __future__ import annotations

from collections.abc import Sequence

from loraq.results.record import Record
from loraq.results.tables.tables import main_table, paired_table
from loraq.results.tables.text import Cell, Item, Table

MAIN = ("row", "bits/weight", "PSNR ↑", "LPIPS ↓")
PAIRED = ("Δ PSNR ↑", "Δ LPIPS ↓")


def brief_table(records: Sequence[Record], baseline: str | None) -> Table:
    """MAIN of the main table and PAIRED of the paired one; the main table where nothing is paired
    or these columns were not measured."""
    main = main_table(records, baseline)
    if baseline is None or len(records) < 2:
        return main
    paired = paired_table(records, baseline)
    if not {*main.columns, *paired.columns}.issuperset((*MAIN, *PAIRED)):
        return main
    differences = {row[0]: _chosen(paired, PAIRED, row) for row in paired.rows}
    itself: list[Item] = [Cell(reason="what the other rows are compared with")] * len(PAIRED)
    rows = [[*_chosen(main, MAIN, row), *differences.get(row[0], itself)] for row in main.rows]
    notes = list(dict.fromkeys([*main.notes, *paired.notes]))
    title = f"Results, and {paired.title[0].lower()}{paired.title[1:]}"
    return Table(title, [*MAIN, *PAIRED], rows, notes)


def _chosen(table: Table, columns: Sequence[str], row: Sequence[Item]) -> list[Item]:
    return [row[table.columns.index(column)] for column in columns]
