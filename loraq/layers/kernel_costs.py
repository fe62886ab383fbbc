"""Whether kernels or emulation are faster on a GPU: a table of layer times over 16-bit ones.

`kernel_costs.json` holds, per architecture and mode of the main product, the time of a layer by
`kernels` and by `emulation` over that of a 16-bit layer, and where the numbers come from: modelled
by counting until they are measured (`python -m experiments.bench.kernel_costs`).
"""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("kernel_costs.json")

Costs = dict[str, dict[str, dict[str, float]]]


@functools.cache
def read_costs() -> Costs:
    """Architecture → mode → {kernels, emulation}."""
    costs: Costs = json.loads(TABLE.read_text(encoding="utf-8"))["costs"]
    return costs


def architecture(device: torch.device) -> str:
    """The name of a GPU's instruction set: sm90, gfx942."""
    if torch.version.hip is None:
        return "sm{}{}".format(*torch.cuda.get_device_capability(device))
    return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]


def kernels_are_faster(mode: str, name: str) -> bool:
    """Whether kernels are faster for main products of a mode (`triton/products.py`) on a GPU.

    One that is not in the table counts as the newest older one of its family that has the mode;
    before the first, emulation is assumed to be faster.
    """
    family, number = _split(name)
    older = [
        row[mode]
        for known, row in sorted(read_costs().items(), key=lambda item: _split(item[0]))
        if mode in row and _split(known)[0] == family and _split(known)[1] <= number
    ]
    return bool(older) and older[-1]["kernels"] < older[-1]["emulation"]


def _split(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z]+)([0-9a-f]+)", name)
    return (found[1], int(found[2], 16)) if found else (name, 0)
