"""Errors of layers by role and depth, as tables whose cells have one of nine colours.

All maps of a page share one logarithmic scale, so that their colours can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loraq.results.plots.layer_errors import role_by_depth
from loraq.results.record import Record

LEVELS = 9
NUMBERS = 14  # blocks up to which cells have room for numbers


@dataclass(frozen=True)
class HeatMap:
    """One row's layers: for each role a cell a block, (number, colour level) or None."""

    label: str
    mean: str
    blocks: list[int]
    roles: list[tuple[str, list[tuple[str, int] | None]]]

    @property
    def dense(self) -> bool:
        return len(self.blocks) > NUMBERS


@dataclass(frozen=True)
class HeatMaps:
    """The maps of the rows shown, of the other rows, and what their colours mean."""

    first: list[HeatMap]
    others: list[HeatMap]
    low: str
    high: str
    what: str


def heat_maps(records: Sequence[Record], shown: Sequence[Record]) -> HeatMaps | None:
    """Of output errors (of weight errors where none was measured); None without any above 0."""
    for error in ("output_error", "weight_error"):
        fields = {r.row: role_by_depth(r, error) for r in records if _above_zero(r, error)}
        if not fields:
            continue
        values = np.concatenate([field.ravel() for _, _, field in fields.values()])
        values = values[np.isfinite(values) & (values > 0)]
        low, high = float(values.min()), float(values.max())
        maps = {
            r.row: _map(r, fields[r.row], math.log(low), math.log(high))
            for r in records
            if r.row in fields
        }
        first = [record.row for record in shown if record.row in maps]
        others = [row for row in maps if row not in first]
        sides = [[maps[row] for row in rows] for rows in (first, others)]
        return HeatMaps(*sides, _number(low), _number(high), error.replace("_", " "))
    return None


def _above_zero(record: Record, error: str) -> bool:
    return any(layer.get(error) for layer in record.layers)


def _map(
    record: Record, field: tuple[list[str], list[int], np.ndarray], low: float, high: float
) -> HeatMap:
    roles, blocks, errors = field
    rows = []
    for role, line in zip(roles, errors, strict=True):
        rows.append((role, [_cell(float(error), low, high) for error in line]))
    mean = _number(float(np.nanmean(errors)))
    return HeatMap(record.label or record.row, mean, blocks, rows)


def _cell(error: float, low: float, high: float) -> tuple[str, int] | None:
    if not math.isfinite(error):
        return None
    share = 0.0 if error <= 0 or high <= low else (math.log(error) - low) / (high - low)
    return _number(error), min(LEVELS - 1, max(0, int(share * LEVELS)))


def _number(error: float) -> str:
    return f"{error:.3f}" if error >= 0.0005 or error == 0 else f"{error:.0e}"
