"""Plain data → validated dataclasses; errors name the setting as the command line writes it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from loraq.config.validation import Checked, hints
from loraq.errors import LoraqError, did_you_mean, near_matches

Schema = TypeVar("Schema", bound=Checked)


def from_plain(schema: type[Schema], values: Any, key: str = "") -> Schema:
    """Convert a mapping to the dataclass `schema`; checks names and types.

    key: the name of the group, for errors. LoraqError for an unknown, missing or invalid setting.
    """
    if not isinstance(values, Mapping):
        raise LoraqError(f"{key}={values!r} must be a group of settings, not a single value.")
    plain: type = schema
    names, annotated = [entry.name for entry in dataclasses.fields(schema)], hints(plain)
    converted = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in names:
            guess = did_you_mean(near_matches(str(name), names))
            raise LoraqError(
                f"{path}={value!r}: unknown setting.{guess}\n"
                f"  Known settings of {key or 'the configuration'}: {', '.join(names)}."
            )
        converted[name] = _convert(annotated[name], value, path)
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
    """Convert a group of settings to its dataclass; other values are checked by the dataclass."""
    options = [option for option in typing.get_args(hint) or (hint,) if option is not type(None)]
    nested = options[0]
    if dataclasses.is_dataclass(nested) and (value is not None or hint is nested):
        assert isinstance(nested, type) and issubclass(nested, Checked)
        return from_plain(nested, value, key)
    return value
