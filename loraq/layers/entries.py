"""Checks of the entries of packed layers, so that a damaged entry is not read as another one.

An entry must hold what `serialize_layers` writes (`serialization.py`), and nothing else; its
formats must be in the table, and its shapes must fit each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.formats import Format, get_format
from loraq.formats.table import BlockName
from loraq.layers.tensors import OPERANDS
from loraq.utils.shape import Shape, check_shape

_FORMAT: Shape = {
    **{"name": str, "family": str, "bits": int, "block": (int, None), "scale": str},
    **{"exponent": str, "clip": str, "tensor_scale": str},
}
_OPERAND: Shape = {"tensors": str, "shape": [int], "format": _FORMAT}
_ENTRY: Shape = {
    **{"weight": _OPERAND, "?left": _OPERAND, "?right": _OPERAND},
    **{
        "activation": _FORMAT,
        "branch_activation": (_FORMAT, None),
        "requantize_intermediate": bool,
    },
    "transform": {"tensors": str, "block": int, "shift": float, "smooth": bool},
    "bias": bool,
}


def check_entries(entries: Mapping[str, Any]) -> None:
    """LoraqError for an entry that no packed layer has; it names the layer."""
    stored: dict[str, Any] = {}
    for name, entry in entries.items():
        check_shape(entry, _ENTRY, name)
        _check_names(entry, _ENTRY, name)
        _check_shapes(entry, name)
        for part in ("activation", "branch_activation"):
            if entry[part] is not None and not stored_format(entry[part], name).per_token:
                raise LoraqError(f"{name}.{part}: the format's scales are not those of one token")
        parts = {part: entry[part] for part in OPERANDS if part in entry}
        for part, operand in parts.items():
            stored_format(operand["format"], f"{name}.{part}")
        parts["transform"] = {**entry["transform"], "width": entry["weight"]["shape"][1]}
        for part, settings in parts.items():
            if stored.setdefault(settings["tensors"], settings) != settings:
                raise LoraqError(
                    f"{name}.{part}: another layer has the tensors '{settings['tensors']}' with "
                    "other settings"
                )


def stored_format(entry: Mapping[str, Any], where: str) -> Format:
    """The format of an entry; LoraqError if it is not in the table."""
    found = Format(**entry)
    complete_axis = found.block is None and found.family != "float"
    block: int | BlockName | None = "channel" if complete_axis else found.block
    options = (found.scale, found.exponent, found.clip, found.tensor_scale)
    if get_format(found.name, block, *options) != found:
        raise LoraqError(f"{where}: {dict(entry)} is not the format '{found.name}' of the table")
    return found


def _check_names(entry: Mapping[str, Any], shape: Shape, where: str) -> None:
    known = [name.removeprefix("?") for name in shape]
    for name, value in entry.items():
        if name not in known:
            raise LoraqError(f"{where}: {unknown('entry', name, known)}")
        part = shape.get(name, shape.get(f"?{name}"))
        if isinstance(value, Mapping):
            _check_names(value, part[0] if isinstance(part, tuple) else part, f"{where}.{name}")


def _check_shapes(entry: Mapping[str, Any], name: str) -> None:
    """weight (O, I), left (O, R), right (R, I); a rotation's block is a power of two in I."""
    shapes = {part: tuple(entry[part]["shape"]) for part in OPERANDS if part in entry}
    if any(len(shape) != 2 or min(shape) < 1 for shape in shapes.values()):
        raise LoraqError(f"{name}: the shapes {shapes} are not those of matrices")
    branch = "left" in shapes, "right" in shapes, entry["branch_activation"] is not None
    if len(set(branch)) > 1:
        raise LoraqError(f"{name}: the entry has only a part of a branch")
    out, width = shapes["weight"]
    if branch[0]:
        rank = shapes["left"][1]
        if shapes["left"] != (out, rank) or shapes["right"] != (rank, width):
            raise LoraqError(f"{name}: the shapes {shapes} do not fit each other")
    block, shift = entry["transform"]["block"], entry["transform"]["shift"]
    if block and (block < 2 or block & (block - 1) or width % block):
        raise LoraqError(f"{name}: block={block} is not a power of two that divides {width}")
    if not abs(shift) < float("inf"):
        raise LoraqError(f"{name}: shift={shift} is not finite")
