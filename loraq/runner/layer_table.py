"""The layers of a model as `loraq inspect` shows and writes them: table, JSON, YAML to edit."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loraq.models.discovery.structure import OUTSIDE, SPATIAL, UNUSED
from loraq.models.family_file import family_text


@dataclass(frozen=True)
class Entry:
    """A layer, or the layers of one role in one list of blocks.

    blocks: the list, "" outside. reason: why it stays in 16 bits, "" if it is quantised.
    bits: per weight, with branch and transform. products: multiply-adds, None if not counted.
    """

    name: str
    blocks: str
    role: str
    layers: int
    shape: tuple[int, int]
    input: str
    after_gelu: bool
    reason: str
    bits: float
    weights: int
    products: int | None


@dataclass(frozen=True)
class Inspection:
    """A model's layers, one entry each, and the totals under a method."""

    title: str
    lines: list[str]
    entries: list[Entry]
    products: int | None
    parameters: int
    family: str

    def text(self, every: bool = False) -> str:
        """A table by list of blocks and role, or of `every` layer; its shares sum to 100 %."""
        shown = self.entries if every else grouped(self.entries)
        head = ["layer" if every else "role", "layers", "out × in", "bits", "weights", "FLOPs"]
        rows = [[*head, "role, reads or why in 16 bits" if every else "reads, or why in 16 bits"]]
        for blocks in sorted({e.blocks: None for e in shown}, key=lambda blocks: not blocks):
            listed = [entry for entry in shown if entry.blocks == blocks]
            if every or not blocks:
                rows += [self._row(entry, entry.name if every else OUTSIDE) for entry in listed]
            else:
                rows.append([blocks, *[""] * len(head)])
                rows += [self._row(entry, f"  {entry.role}") for entry in listed]
        weights = self.parameters - sum(entry.weights for entry in self.entries)
        attention = None
        if self.products is not None:
            attention = self.products - sum(entry.products or 0 for entry in self.entries)
        rows.append(
            ["norms, biases, attention", "", "", "16.00", *self._shares(weights, attention), ""]
        )
        bits = 16.0 * weights + sum(entry.bits * entry.weights for entry in self.entries)
        mean = f"{bits / self.parameters:.2f}"
        total = self._shares(self.parameters, self.products)
        rows.append(["total", f"{len(self.entries)}", "", mean, *total, ""])
        return "\n".join([self.title, *self.lines, "", *_aligned(rows)])

    def _row(self, entry: Entry, name: str) -> list[str]:
        reads = f"{entry.input} (GELU)" if entry.after_gelu else entry.input
        last = "" if entry.reason == name else entry.reason or reads
        return [
            name,
            f"{entry.layers}",
            f"{entry.shape[0]} × {entry.shape[1]}" if all(entry.shape) else "several",
            f"{entry.bits:.2f}",
            *self._shares(entry.weights, entry.products),
            f"{entry.role}, {last}" if name == entry.name and entry.blocks else last,
        ]

    def _shares(self, weights: int, products: int | None) -> tuple[str, str]:
        share = "–"
        if products is not None and self.products:
            share = f"{100 * products / self.products:.1f} %"
        return f"{100 * weights / self.parameters:.1f} %", share

    def plain(self) -> dict[str, Any]:
        """The values for a JSON file."""
        plain = {"model": self.title, "notes": self.lines, "parameters": self.parameters}
        return plain | {"products": self.products, "layers": [asdict(e) for e in self.entries]}

    def yaml(self) -> str:
        """The layers of blocks as a family's file."""
        layers: dict[str, tuple[str, bool]] = {}
        for entry in self.entries:
            if entry.blocks and entry.reason not in (SPATIAL, UNUSED):
                name = re.sub(rf"(?<={re.escape(entry.blocks)}\.)\d+", "*", entry.name)
                layers.setdefault(name, (entry.role, bool(entry.reason)))
        return family_text(self.family, self.title, layers)

    def __repr__(self) -> str:
        return f"Inspection({self.title!r}, {len(self.entries)} layers)"


def grouped(entries: Sequence[Entry]) -> list[Entry]:
    """One entry for the layers of one role in one list of blocks, and one for those outside."""
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for entry in entries:
        role = entry.role if entry.blocks else ""
        groups.setdefault((entry.blocks, role, entry.reason), []).append(entry)
    found = []
    for (blocks, role, reason), members in groups.items():
        shapes, inputs = {e.shape for e in members}, {e.input for e in members}
        weights = sum(e.weights for e in members)
        counted = [e.products for e in members if e.products is not None]
        found.append(
            Entry(
                members[0].name,
                blocks,
                role,
                len(members),
                members[0].shape if len(shapes) == 1 else (0, 0),
                members[0].input if len(inputs) == 1 else "several",
                all(e.after_gelu for e in members),
                reason,
                sum(e.bits * e.weights for e in members) / max(1, weights),
                weights,
                sum(counted) if len(counted) == len(members) else None,
            )
        )
    return found


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of columns: names and reasons to the left, so that long ones stay short lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *middle, last in rows:
        cells = [text.rjust(width) for text, width in zip(middle, widths[1:], strict=False)]
        lines.append("  ".join([first.ljust(widths[0]), *cells, last]).rstrip())
    return lines
