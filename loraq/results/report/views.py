"""Tables for the page's template: text, interval bar and sort value of each cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from loraq.results.tables.text import Cell, Item, Table

HEADINGS = {
    "main": "Results",
    "paired": "Paired differences",
    "splits": "Seen and held out",
    "limits": "Rate–distortion references",
}


@dataclass(frozen=True)
class CellView:
    """A cell for the template.

    value: sort value. number: whether the cell is right-aligned. claim: "better" or "worse".
    track: (start, end, value, zero) of the interval bar, in % of the column's range.
    """

    text: str
    value: float | str
    number: bool
    interval: str = ""
    claim: str = ""
    track: tuple[float, float, float, float | None] | None = None


@dataclass(frozen=True)
class TableView:
    """A table for the template."""

    key: str
    heading: str
    title: str
    columns: list[str]
    rows: list[list[CellView]]
    notes: list[str]

    def __repr__(self) -> str:
        return f"TableView({self.key!r}, {len(self.rows)} rows × {len(self.columns)} columns)"


def table_view(key: str, table: Table) -> TableView:
    """Convert a table; `key` is its name in `all_tables`."""
    spans = [_span(column) for column in zip(*table.rows, strict=True)]
    rows = [
        [cell_view(item, span) for item, span in zip(row, spans, strict=True)] for row in table.rows
    ]
    notes = [note.replace("`", "") for note in table.notes] + _reasons(table)
    columns = [_unbroken(column) for column in table.columns]
    return TableView(key, HEADINGS.get(key, key), table.title, columns, aligned(rows), notes)


def _unbroken(title: str) -> str:
    """Return a column title with non-breaking spaces at its signs."""
    for sign in (" ↑", " ↓", "Δ "):
        title = title.replace(sign, sign.replace(" ", "\u00a0"))
    return title


def _reasons(table: Table) -> list[str]:
    """Return the reasons for missing intervals and values, each with its columns."""
    found: dict[str, list[str]] = {}
    for title, column in zip(table.columns, zip(*table.rows, strict=True), strict=True):
        reasons = [item.reason for item in column if isinstance(item, Cell) and item.bare]
        for reason in filter(None, dict.fromkeys(reasons)):
            found.setdefault(reason, []).append(title.rstrip(" ↑↓"))
    return [f"{', '.join(columns)}: {reason}" for reason, columns in found.items()]


def aligned(rows: list[list[CellView]]) -> list[list[CellView]]:
    """Return the cells with `number` unset in columns that also contain text."""
    numbers = [all(cell.number for cell in column) for column in zip(*rows, strict=True)]
    return [
        [replace(cell, number=number) for cell, number in zip(row, numbers, strict=True)]
        for row in rows
    ]


def cell_view(item: Item, span: tuple[float, float] | None = None) -> CellView:
    """Convert a cell; `span` is the range of its column's intervals."""
    if isinstance(item, Cell):
        return _measured(item, span)
    if isinstance(item, int):
        return CellView(f"{item:,}", item, True)
    try:
        return CellView(item, float(item), True)
    except ValueError:
        return CellView(item, "" if item == "–" else item, item == "–")


def _measured(cell: Cell, span: tuple[float, float] | None) -> CellView:
    value = "" if cell.value is None else cell.value
    if cell.bare:
        return CellView(cell.text(), value, True)
    interval, claim = cell.interval(), cell.mark
    return CellView(cell.number(), value, True, interval, claim, _track(cell, span))


def _span(column: Sequence[Any]) -> tuple[float, float] | None:
    """Return the range of a column's intervals; None if it has none."""
    ends = [
        float(end)
        for item in column
        if isinstance(item, Cell) and not item.bare
        for end in (item.lo, item.hi, item.value)
        if end is not None and math.isfinite(end)
    ]
    return (min(ends), max(ends)) if ends and max(ends) > min(ends) else None


def _track(
    cell: Cell, span: tuple[float, float] | None
) -> tuple[float, float, float, float | None] | None:
    parts = (cell.lo, cell.hi, cell.value)
    if span is None or any(part is None or not math.isfinite(part) for part in parts):
        return None
    low, high = span
    start, end, place = (round(100 * (float(part or 0) - low) / (high - low), 1) for part in parts)
    zero = round(-100 * low / (high - low), 1) if cell.sign and low < 0 < high else None
    return start, end, place, zero
