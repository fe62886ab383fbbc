"""Plain data → validated dataclasses; errors name the setting as the command line writes it."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from loraq.config.validation import Checked
from loraq.errors import LoraqError, did_you_mean, near_matches

Schema = TypeVar("Schema", bound=Checked)


def from_plain(schema: type[Schema], values: Any, key: str = "") -> Schema:
    """Convert a mapping to the dataclass `schema`; checks names and types.

    key: the name of the group, for errors. LoraqError for an unknown, missing or invalid setting.
    """
    if not isinstance(values, Mapping):
        raise LoraqError(f"{key}={values!r} must be a group of settings, not a single value.")
    hints = typing.get_type_hints(schema)
    names = [entry.name for entry in dataclasses.fields(schema)]
    converted = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in hints:
            guess = did_you_mean(near_matches(str(name), names))
            raise LoraqError(
                f"{path}={value!r}: unknown setting.{guess}\n"
                f"  Known settings of {key or 'the configuration'}: {', '.join(names)}."
            )
        converted[name] = _convert(hints[name], value, path)
    missing = [
        entry.name
        for entry in dataclasses.fields(schema)
        if entry.name not in converted
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise LoraqError(f"{key or 'config'}: {', '.join(missing)} must be given.")
    try:
        return schema(**converted)
    except LoraqError as error:
        text = str(error)
        first = text.split("=", 1)[0].split(":", 1)[0]
        raise LoraqError(f"{key}.{text}" if key and first in names else text) from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    """Convert one value to its annotated type; floats are not truncated, strings not parsed."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        plain = [option for option in options if option is not type(None)]
        hint = next((option for option in plain if type(value) is option), plain[0])
        return _convert(hint, value, key)
    if origin is Literal:
        return _convert(type(options[0]), value, key)  # the dataclass checks the value itself
    if dataclasses.is_dataclass(hint):
        assert isinstance(hint, type) and issubclass(hint, Checked)
        return from_plain(hint, value, key)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise LoraqError(f"{key}={value!r} must be a list. Write '{key}=[{value}]'.")
        return tuple(_convert(options[0], item, key) for item in value)
    if origin is dict:
        return dict(value or {})
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    raise LoraqError(f"{key}={value!r} must be {names.get(hint, hint)}.")
