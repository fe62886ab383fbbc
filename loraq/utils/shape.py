"""The shapes of data in JSON files, checked when a file is read.

A shape is a type (`float` includes whole numbers), None, a tuple of alternatives, a list of one
shape that all items have, or a dict of names and shapes. A name that starts with "?" may be
missing; "*" stands for all names that the dict does not list, which otherwise may hold anything.
"""

from __future__ import annotations

import json
from typing import Any

from loraq.errors import LoraqError

Shape = Any
LARGEST = 2**1000  # whole numbers that fit into a float

_NAMES = {
    float: "a number",
    int: "a whole number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    None: "null",
}


def check_shape(value: Any, shape: Shape, where: str) -> None:
    """LoraqError if `value` does not have the shape; it names the place below `where`."""
    if isinstance(shape, tuple):
        fitting = [part for part in shape if _same_kind(value, part)]
        if not fitting:
            raise _refusal(value, " or ".join(map(_name, shape)), where)
        shape = fitting[0]
    elif not _same_kind(value, shape):
        raise _refusal(value, _name(shape), where)
    if isinstance(shape, list) and not (shape == [float] and set(map(type, value)) <= {float}):
        for place, item in enumerate(value):
            check_shape(item, shape[0], f"{where}[{place}]")
    if isinstance(shape, dict):
        named = {name.removeprefix("?"): part for name, part in shape.items() if name != "*"}
        if missing := [name for name in shape if name not in value and name[0] not in "?*"]:
            raise LoraqError(f"{where}: the entry '{missing[0]}' is missing")
        for name, item in value.items():
            if name in named or "*" in shape:
                check_shape(item, named.get(name, shape.get("*")), f"{where}.{name}")


def _same_kind(value: Any, shape: Shape) -> bool:
    """Whether the value is of the shape's kind, without a look at what it contains."""
    if shape is None:
        return value is None
    if shape in (int, float):
        whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) < LARGEST
        return whole or (shape is float and isinstance(value, float))
    return isinstance(value, shape if isinstance(shape, type) else type(shape))


def _name(shape: Shape) -> str:
    return (
        "a list" if isinstance(shape, list) else _NAMES[dict if isinstance(shape, dict) else shape]
    )


def _refusal(value: Any, wanted: str, where: str) -> LoraqError:
    return LoraqError(f"{where} is {json.dumps(value)[:60]}, not {wanted}")
