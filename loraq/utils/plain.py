"""Dataclasses → plain data for JSON (cache keys, records, manifests), and JSON → data."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from loraq.errors import LoraqError

_PLAIN = frozenset({str, int, bool, type(None)})
"""Types of values that stay as they are: most of what is converted."""
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def to_plain(value: Any, *, new_defaults: bool = True, where: str = "value") -> Any:
    """Convert `value` to dicts, lists, str, int, float, bool and None.

    Dataclasses become dicts of their fields, tuples lists, paths strings, numpy and torch scalars
    Python numbers, non-finite floats `{"float": "inf"}`. LoraqError for any other type; it names
    the place in the data, which starts with `where`.

    new_defaults: include fields that a later release added (`since`) and that have their default.
        Cache keys leave these out, so that keys of earlier releases do not change.
    """
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {"float": str(number)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: item
            if type(item := getattr(value, field.name)) in _PLAIN
            else to_plain(item, new_defaults=new_defaults, where=f"{where}.{field.name}")
            for field in dataclasses.fields(value)
            if new_defaults or not _is_new_default(value, field)
        }
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise LoraqError(f"{where}: key {name!r} is not a string")
        return {
            name: item
            if type(item) in _PLAIN
            else to_plain(item, new_defaults=new_defaults, where=f"{where}.{name}")
            for name, item in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [
            to_plain(item, new_defaults=new_defaults, where=f"{where}[{index}]")
            for index, item in enumerate(value)
        ]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return to_plain(value.item(), new_defaults=new_defaults, where=where)
    raise LoraqError(f"{where}: a {type(value).__name__} cannot be written as plain data")


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default of a dataclass field; `dataclasses.MISSING` if it has none."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _is_new_default(config: Any, field: dataclasses.Field[Any]) -> bool:
    """Whether a later release added the field and it has its default."""
    if not field.metadata.get("since"):
        return False
    return bool(getattr(config, field.name) == default_of(field))


def decode_float(item: dict[str, Any]) -> Any:
    """Convert `{"float": "inf"}` of `to_plain` back to a float (an `object_hook` for json)."""
    if set(item) == {"float"} and item["float"] in _NON_FINITE:
        return _NON_FINITE[item["float"]]
    return item


def parse_json(text: str, *, floats: bool = False) -> Any:
    """The data of a JSON text; ValueError for anything that the standard does not define.

    Python's own reader keeps the last of two entries with the same name, and accepts NaN.

    floats: convert `{"float": "inf"}` of `to_plain` back to floats.
    """

    def unique(pairs: list[tuple[str, Any]]) -> Any:
        item = dict(pairs)
        if len(item) < len(pairs):
            names = [name for name, _ in pairs]
            name = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the name {name!r} occurs twice in one object")
        return decode_float(item) if floats else item

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is not a value of JSON")

    try:
        return json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except RecursionError:
        raise ValueError("the data is nested too deeply") from None
