"""Heat maps of layer errors, role × block, as HTML tables with nine colour levels.

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
NUMBERS = 14  # largest number of blocks for which cells show numbers


@dataclass(frozen=True)
class HeatMap:
    """Layer errors of one row: (role, cells); a cell is (number, colour level), or None."""

    label: str
    mean: str
    blocks: list[int]
    roles: list[tuple[str, list[tuple[str, int] | None]]]

    def __repr__(self) -> str:
        return f"HeatMap({self.label!r}, {len(self.roles)} roles × {len(self.blocks)} blocks)"

    @property
    def dense(self) -> bool:
        """Whether the cells are too narrow for numbers."""
        return len(self.blocks) > NUMBERS


@dataclass(frozen=True)
class HeatMaps:
    """The maps of the selected rows and of the other rows, and the range of their errors."""

    first: list[HeatMap]
    others: list[HeatMap]
    low: str
    high: str
    what: str

    def __repr__(self) -> str:
        count = len(self.first) + len(self.others)
        return f"HeatMaps({count} rows, {self.what} {self.low} to {self.high})"


def heat_maps(records: Sequence[Record], shown: Sequence[Record]) -> HeatMaps | None:
    """Build the maps of output errors, else of weight errors; None if no error is above 0."""
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
        selected = [record.row for record in shown if record.row in maps]
        first = [maps[row] for row in selected]
        others = [heat_map for row, heat_map in maps.items() if row not in selected]
        return HeatMaps(first, others, _number(low), _number(high), error.replace("_", " "))
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
