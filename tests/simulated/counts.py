"""Counts of what costs time on a GPU, each by kind and by the place that caused it."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
HIDDEN = (
    *(str(Path(__file__).with_name(name)) for name in ("counts.py", "device.py", "tensors.py")),
    f"{Path(torch.__file__).parent}/",
    "<",
)
"""Starts of the names of files that are no places: the simulation's, torch's, generated ones."""


@dataclass
class Counts:
    """Counters of (kind, place); a place is 'file:line function'.

    waits: the host waits for the device, as for an item, a boolean index or a copy to the host.
    copies: from the host to the device.
    float64: matrix products and decompositions in float64, which many GPUs compute 64 times slower.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    copies: Counter[tuple[str, str]] = field(default_factory=Counter)
    float64: Counter[tuple[str, str]] = field(default_factory=Counter)

    def reset(self) -> None:
        """Start all counts at 0."""
        for counter in (self.waits, self.copies, self.float64):
            counter.clear()

    def report(self) -> str:
        """The counts as text, one line a place."""
        lines = []
        for name in ("waits", "copies", "float64"):
            counter = getattr(self, name)
            lines.append(f"{name}: {counter.total()}")
            lines += [f"  {n:6} {kind}: {where}" for (kind, where), n in counter.most_common()]
        return "\n".join(lines)


def place() -> str:
    """The innermost line outside of torch and of the simulation."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(HIDDEN):
            short = file.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
            return f"{short}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "backward pass"  # autograd's threads have no frames of ours
