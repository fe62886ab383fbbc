"""The door: the composed config → checked dataclasses, and back to plain data for keys and records.

Nothing is guessed or cut on the way; after `from_hydra` no `DictConfig` travels any further.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from loraq.config import Config
from loraq.errors import LoraqError, did_you_mean, near_matches
from loraq.own_file import is_own_file, label


def to_plain(config: Any) -> Any:
    """A dataclass as plain dicts, lists and numbers, as records and keys hold it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        names = [entry.name for entry in dataclasses.fields(config)]
        return {name: to_plain(getattr(config, name)) for name in names}
    if isinstance(config, Mapping):
        return {str(name): to_plain(value) for name, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_plain(value) for value in config]
    return config


def from_plain(schema: Any, values: Any, key: str = "") -> Any:
    """Plain data into dataclass `schema`; types and names are checked, errors name the key."""
    if not isinstance(values, Mapping):
        raise LoraqError(f"{key}={values!r} must be a group of settings, not a single value.")
    hints = typing.get_type_hints(schema)
    names = [entry.name for entry in dataclasses.fields(schema)]
    made = {}
    for name, value in values.items():
        path = f"{key}.{name}" if key else str(name)
        if name not in hints:
            guess = did_you_mean(near_matches(str(name), names))
            raise LoraqError(
                f"{path}={value!r}: there is no such setting.{guess}\n"
                f"  Known under '{key or 'the top'}': {', '.join(names)}."
            )
        made[name] = _convert(hints[name], value, path)
    missing = [
        entry.name
        for entry in dataclasses.fields(schema)
        if entry.name not in made
        and entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise LoraqError(f"{key or 'config'}: {', '.join(missing)} must be given.")
    try:
        return schema(**made)
    except LoraqError as error:
        text = str(error)
        first = text.split("=", 1)[0].split(":", 1)[0]
        raise LoraqError(f"{key}.{text}" if key and first in names else text) from None


def _convert(hint: Any, value: Any, key: str) -> Any:
    """One value as its annotated type; numbers are never cut, text is never guessed."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        plain = [option for option in options if option is not type(None)]
        hint = next((option for option in plain if type(value) is option), plain[0])
        return _convert(hint, value, key)
    if dataclasses.is_dataclass(hint):
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


def from_hydra(composed: Mapping[str, Any]) -> Config:
    """What was composed, as plain data, as a checked `Config`: the door."""
    plain = {name: value for name, value in composed.items() if name != "rows"}
    config: Config = from_plain(Config, plain)
    if config.quant is not None:
        config.quant.formats()
        if is_own_file(config.quant.branch.kind):
            label(config.quant.branch.kind)  # a file that is not there is answered here
        if config.quant.skip is None:
            from loraq.models.families import family

            skip = tuple(family(config.model.family).DEFAULT_SKIP)
            quant = dataclasses.replace(config.quant, skip=skip)
            config = dataclasses.replace(config, quant=quant)
    from loraq.metrics import module

    for name in config.metrics.names:
        try:
            module(name)
        except LoraqError as error:
            raise LoraqError(f"metrics.names: {error}") from None
    return config
