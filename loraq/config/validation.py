"""The base of the configuration dataclasses: fields with limits, checked on construction."""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

from loraq.errors import LoraqError, unknown
from loraq.utils.plain import default_of
from loraq.utils.user_module import is_user_file, modules_defining


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    only_for: tuple[str, ...] = (),
    since: str = "",
    user_file: bool = False,
    modules: tuple[str, str] | None = None,
) -> Any:
    """A dataclass field with limits; None is valid if the annotation allows it.

    The values of a choice are those of its annotation, `Literal["none", "search"]`.

    default: `dataclasses.MISSING` if the value is required.
    only_for: values of the group's main choice for which this setting has an effect; with other
        values, anything but the default raises.
    since: the release that added the setting. Cache keys leave it out at its default, so that
        products of earlier releases are still found.
    user_file: the path of a user's Python file is valid as well and may read every setting.
    modules: (package, function): names of modules of `loraq/PACKAGE/` that define this function are
        valid as well. One that the annotation does not list may read every setting.
    """
    limits = {"at_least": at_least, "above": above, "below": below}
    metadata = {**limits, "only_for": only_for, "since": since, "user_file": user_file}
    metadata["modules"] = modules
    return field(default=default, metadata=metadata)


@functools.cache
def choices(schema: type) -> dict[str, tuple[str, ...]]:
    """The allowed values of every field of `schema` whose annotation contains a Literal."""
    found = {name: _literal_values(hint) for name, hint in typing.get_type_hints(schema).items()}
    return {name: values for name, values in found.items() if values}


def _literal_values(hint: Any) -> tuple[str, ...]:
    """The values of `Literal[…]`, alone or in a union such as `Literal[…] | str`."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return options
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return ()
    return tuple(value for option in options for value in _literal_values(option))


@dataclass(frozen=True, repr=False)
class Checked:
    """Base of the configuration dataclasses: checks choices and limits on construction."""

    def __post_init__(self) -> None:
        schema: type = type(self)
        allowed = choices(schema)
        for entry in dataclasses.fields(self):
            value, limits = getattr(self, entry.name), entry.metadata
            from_file = limits.get("user_file") and is_user_file(value)
            valid = allowed.get(entry.name, ())
            if valid and limits.get("modules"):
                valid = tuple(dict.fromkeys((*valid, *modules_defining(*limits["modules"]))))
            if valid and value not in valid and not from_file:
                problem = unknown(entry.name, str(value), valid)
                raise LoraqError(f"{entry.name}: {problem}")
            if value is None:
                continue
            least, above, below = (limits.get(n) for n in ("at_least", "above", "below"))
            if least is not None and value < least:
                raise LoraqError(
                    f"{entry.name}={value} is below the limit {least:g}. Give {least:g} or more."
                )
            if above is not None and not value > above:
                remedy = "a positive number" if above == 0 else f"more than {above:g}"
                raise LoraqError(f"{entry.name}={value} must be above {above:g}. Give {remedy}.")
            if below is not None and not value < below:
                raise LoraqError(
                    f"{entry.name}={value} must be below {below:g}. Give less than {below:g}."
                )

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
