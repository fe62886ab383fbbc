"""What a method takes and returns, as JSON and named tensors: for files, and to compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from loraq.errors import LoraqError


def comparable(value: Any, owner: str) -> Any:
    """A value as JSON holds it: tuples are lists, tensors their hash, devices None.

    owner: whose value it is, for the LoraqError for one that is not plain data.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, torch.device):
        return None
    if isinstance(value, torch.dtype):
        return str(value)
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        digest = hashlib.sha256(data.tobytes()).hexdigest()
        return f"{value.dtype} {[*value.shape]} {digest}"
    if isinstance(value, list | tuple):
        return [comparable(entry, owner) for entry in value]
    if isinstance(value, Mapping):
        return {str(name): comparable(entry, owner) for name, entry in value.items()}
    raise LoraqError(
        f"{owner} is a {type(value).__name__}, so the text depends on more than prompts and "
        "numbers. Leave the argument out of model.call."
    )


def describe(
    value: Any, name: str, parts: Sequence[str], tensors: dict[str, Tensor], device: torch.device
) -> Any:
    """The structure of `value` as JSON, from which `rebuild` makes it again.

    Its tensors are added to `tensors`, on the CPU, under names that begin with `name`. parts: names
    of the entries of a tuple; of a value that is no tuple, its own. A tensor that is not on
    `device` stays on the CPU. LoraqError for other than plain data and tensors.
    """
    if isinstance(value, Tensor):
        full = f"{name}.{parts[0]}" if len(parts) == 1 else name
        tensors[full] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": full, "moved": value.device.type == device.type}
    if value is None or isinstance(value, bool | int | float | str):
        return {"value": value}
    if type(value) in (list, tuple):
        named = type(value) is tuple and len(parts) == len(value)
        if len(parts) == 1 and not named:
            name, parts = f"{name}.{parts[0]}", ()
        own = parts if named else [str(place) for place in range(len(value))]
        entries = [
            describe(entry, f"{name}.{part}", (), tensors, device)
            for part, entry in zip(own, value, strict=True)
        ]
        return {type(value).__name__: entries}
    if type(value) is dict:
        return {
            "dict": {
                part: describe(entry, f"{name}.{part}", (), tensors, device)
                for part, entry in value.items()
            }
        }
    raise LoraqError(
        f"A {type(value).__name__} cannot be kept in a file; lists, tuples, dictionaries, tensors, "
        "numbers and texts can."
    )


def rebuild(described: Mapping[str, Any], tensors: Mapping[str, Tensor], device: Any) -> Any:
    """The value that `describe` wrote. Its tensors are new ones, which may be changed in place."""
    match described:
        case {"tensor": name, "moved": moved}:
            return tensors[name].to(device if moved else "cpu", copy=True)
        case {"value": value}:
            return value
        case {"dict": entries}:
            return {name: rebuild(entry, tensors, device) for name, entry in entries.items()}
        case {"tuple": entries}:
            return tuple(rebuild(entry, tensors, device) for entry in entries)
        case {"list": entries}:
            return [rebuild(entry, tensors, device) for entry in entries]
    raise LoraqError(f"{described!r} is no description of a kept value.")
