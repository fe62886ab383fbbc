"""The base of the configuration dataclasses: fields with limits, checked on construction."""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from loraq.errors import LoraqError, unknown
from loraq.utils.names import check_file_name, check_label
from loraq.utils.plain import default_of
from loraq.utils.user_module import is_user_file, modules_defining

LARGEST_SEED = 2**32 - 1


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    below: float | None = None,
    only_for: tuple[str, ...] = (),
    since: str = "",
    user_file: bool = False,
    modules: tuple[str, str] | None = None,
    names: Literal["file", "label"] | None = None,
) -> Any:
    """A dataclass field with limits; None is valid if the annotation allows it.

    The values of a choice are those of its annotation, `Literal["none", "search"]`. Every number
    has a lower and an upper limit (`tests/conf/test_limits.py`).

    default: `dataclasses.MISSING` if the value is required.
    only_for: values of the group's main choice for which this setting has an effect; with other
        values, anything but the default raises.
    since: the release that added the setting. Cache keys leave it out at its default, so that
        products of earlier releases are still found.
    user_file: the path of a user's Python file is valid as well and may read every setting.
    modules: (package, function): names of modules of `loraq/PACKAGE/` that define this function are
        valid as well. One that the annotation does not list may read every setting.
    names: the text becomes the name of a file or folder, or a label in tables (`utils/names.py`).
    """
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "below": below}
    metadata = {**limits, "only_for": only_for, "since": since, "user_file": user_file}
    return field(default=default, metadata={**metadata, "modules": modules, "names": names})


@functools.cache
def hints(schema: type) -> dict[str, Any]:
    """The annotations of a dataclass as types."""
    return typing.get_type_hints(schema)


@functools.cache
def choices(schema: type) -> dict[str, tuple[str, ...]]:
    """The allowed values of every field of `schema` whose annotation contains a Literal."""
    found = {name: _literal_values(hint) for name, hint in hints(schema).items()}
    return {name: values for name, values in found.items() if values}


def _literal_values(hint: Any) -> tuple[str, ...]:
    """The values of `Literal[…]`, alone or in a union such as `Literal[…] | str`."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return options
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return ()
    return tuple(value for option in options for value in _literal_values(option))


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


def typed(hint: Any, value: Any, name: str) -> Any:
    """`value` if it has the annotated type; a whole number as a float, a list as a tuple.

    LoraqError otherwise: floats are not cut, strings not parsed.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        plain = [option for option in options if option is not type(None)]
        return typed(next((o for o in plain if type(value) is o), plain[0]), value, name)
    if origin is Literal:
        return typed(type(options[0]), value, name)  # its values are checked with the choices
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise LoraqError(f"{name}={value!r} must be a list. Write '{name}=[{value}]'.")
        return tuple(typed(options[0], item, name) for item in value)
    if origin is dict:
        if not isinstance(value, Mapping | types.NoneType):
            raise LoraqError(f"{name}={value!r} must be a group of settings. Write {{KEY: VALUE}}.")
        return dict(value or {})
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if hint is float and number:
        try:
            return float(value)
        except OverflowError:
            return math.inf  # a whole number beyond the range of floats
    if hint is int and number and isinstance(value, numbers.Integral):
        return int(value)
    if hint is Any or (hint not in (int, float) and isinstance(value, hint)):
        return value
    raise LoraqError(f"{name}={value!r} must be {_WORDS.get(hint, f'a {hint.__name__}')}.")


def check_limits(name: str, value: float, limits: Mapping[str, Any]) -> None:
    """LoraqError for a number outside the limits of `setting`, or one that is NaN or infinite."""
    least, most, above, below = (limits.get(n) for n in ("at_least", "at_most", "above", "below"))
    if isinstance(value, float) and not math.isfinite(value):
        raise LoraqError(f"{name}={value} is not a finite number. Give {_range(limits)}.")
    if least is not None and value < least:
        raise LoraqError(f"{name}={value} is below the limit {least:g}. Give {_range(limits)}.")
    if most is not None and value > most:
        raise LoraqError(f"{name}={value} is above the limit {most:,}. Give {_range(limits)}.")
    if above is not None and value <= above:
        raise LoraqError(f"{name}={value} must be above {above:g}. Give {_range(limits)}.")
    if below is not None and value >= below:
        raise LoraqError(f"{name}={value} must be below {below:g}. Give {_range(limits)}.")


def _range(limits: Mapping[str, Any]) -> str:
    least, most, above, below = (limits.get(n) for n in ("at_least", "at_most", "above", "below"))
    first = f"{least:g} or more" if least is not None else f"more than {above:g}"
    last = f"at most {most:,}" if most is not None else f"less than {below:g}"
    return f"{first}, {last}"


@dataclass(frozen=True, repr=False)
class Checked:
    """Base of the configuration dataclasses: checks types, choices and limits on construction."""

    def __post_init__(self) -> None:
        schema: type = type(self)
        allowed, annotated = choices(schema), hints(schema)
        for entry in dataclasses.fields(self):
            limits = entry.metadata
            value = typed(annotated[entry.name], getattr(self, entry.name), entry.name)
            object.__setattr__(self, entry.name, value)
            if value is None:
                continue
            from_file = limits.get("user_file") and is_user_file(value)
            valid = allowed.get(entry.name, ())
            if valid and limits.get("modules"):
                valid = tuple(dict.fromkeys((*valid, *modules_defining(*limits["modules"]))))
            if valid and value not in valid and not from_file:
                problem = unknown(entry.name, str(value), valid)
                raise LoraqError(f"{entry.name}: {problem}")
            if isinstance(value, int | float) and not isinstance(value, bool):
                check_limits(entry.name, value, limits)
            if isinstance(value, str) and limits.get("names"):
                check = check_file_name if limits["names"] == "file" else check_label
                check(entry.name, value)

    def __repr__(self) -> str:
        """A Python expression with the fields that differ from their defaults."""
        values = ((entry, getattr(self, entry.name)) for entry in dataclasses.fields(self))
        shown = [f"{entry.name}={v!r}" for entry, v in values if v != default_of(entry)]
        return f"{type(self).__name__}({', '.join(shown)})"

    def check_only_for(self, main: str, group: str) -> None:
        """LoraqError for a setting that has no effect with the group's main choice."""
        chosen = getattr(self, main)
        schema: type = type(self)
        if chosen not in choices(schema)[main]:  # a user's file, or a module added since
            return
        for entry in dataclasses.fields(self):
            readers = entry.metadata.get("only_for", ())
            value = getattr(self, entry.name)
            if readers and chosen not in readers and value != entry.default:
                raise LoraqError(
                    f"{entry.name}={value} has no effect with {main}={chosen}, only with "
                    f"{' or '.join(readers)}. Leave it out, or set {group}.{main}."
                )
