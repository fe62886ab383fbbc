"""A list of overrides → one configuration: composes like Hydra, in a fraction of the time.

Hydra parses all files again for each row of an experiment. Here a text is parsed once in a process,
and a row is merged from plain dicts in the order of the defaults list. Supported is the part of
Hydra's syntax that `conf/` uses:

    config.yaml     `_self_`, `GROUP: OPTION`, `GROUP@PACKAGE: OPTION`
    groups' files   `_self_`, `NAME` of the same group, `override /GROUP: OPTION` (without
                    `# @package _global_`: `override /GROUP@_global_.GROUP`), `# @package NAME`
    overrides       GROUP=OPTION, GROUP@PACKAGE=OPTION, KEY=VALUE, +KEY=VALUE, ~KEY

Anything else, errors included, raises `NeedsHydra` and is composed by `compose_with_hydra`;
`tests/conf/test_composition.py` checks that both results are equal.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.config.by_hydra import PRIMARY, compose_with_hydra, has_other_folders
from loraq.errors import LoraqError

if TYPE_CHECKING:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Override

_HEADER = re.compile(r"#\s*@package\s+(\S+)")
_PLAIN_KEY = re.compile(r"[^.\[\]]+(\.[^.\[\]]+)*")


class NeedsHydra(Exception):
    """The configuration uses a part of Hydra's syntax that `Composer` does not support."""


@dataclass(frozen=True)
class _File:
    """A file's `# @package` header (None: its group's name), defaults list and content."""

    package: str | None
    defaults: list[Any]
    content: dict[str, Any]


class Composer:
    """Composes lists of overrides with the configuration in `folder`; reads each file at most once.

    Use one composer per command: it does not notice files that change later.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, _File] = {}

    def __repr__(self) -> str:
        return f"Composer('{self.folder}', {len(self._files)} files read)"

    def compose(self, overrides: Sequence[str]) -> dict[str, Any]:
        """The composed configuration, without `hydra` and with interpolations not resolved."""
        try:
            if has_other_folders():
                raise NeedsHydra
            return self.merge([self.parse(override) for override in overrides])
        except NeedsHydra:
            return compose_with_hydra(self.folder, overrides)

    def parse(self, override: str) -> Override:
        """Parse one override; LoraqError if it is not valid."""
        return _parse_override(override)

    @cached_property
    def groups(self) -> dict[str, list[str]]:
        """The groups of the configuration and their options."""
        folders = (f for f in sorted(self.folder.iterdir()) if f.is_dir() and f.name != "hydra")
        return {f.name: sorted(path.stem for path in f.glob("*.yaml")) for f in folders}

    @cached_property
    def keys(self) -> list[str]:
        """The dotted names of all settings."""
        return _flat_keys(self.compose([]))

    def merge(self, entries: Sequence[Override]) -> dict[str, Any]:
        """Merge the chosen files in order, then the overrides' values; may raise NeedsHydra."""
        chosen: dict[str, Any] = {}
        values = []
        for entry in entries:
            if entry.key_or_group.startswith("hydra") or entry.is_sweep_override():
                raise NeedsHydra
            if not (self.folder / entry.key_or_group).is_dir():
                values.append(entry)
                continue
            added = entry.is_add() or entry.is_force_add()
            if added or entry.is_delete() or not isinstance(entry.value(), str):
                raise NeedsHydra
            chosen[entry.get_key_element()] = entry.value()
        unused = set(chosen)
        tree: dict[str, Any] = {}
        for place, content in self._parts(PRIMARY, (), chosen, unused):
            for name in reversed(place):
                content = {name: content}
            tree = _merge(tree, content)
        if unused:
            raise NeedsHydra
        tree.pop("hydra", None)
        for entry in values:
            if entry.package is not None or not _PLAIN_KEY.fullmatch(entry.key_or_group):
                raise NeedsHydra
            tree = _apply_override(tree, entry.key_or_group.split("."), entry)
        return tree

    def _parts(
        self, name: str, place: tuple[str, ...], chosen: dict[str, Any], unused: set[str]
    ) -> list[tuple[tuple[str, ...], dict[str, Any]]]:
        """The contents of a file and of its defaults list, each with its key path, in merge order.

        As in Hydra, the last entry of a list is read first, and the first `override` of a choice
        wins: the command line's, then an experiment's, then a method's.
        """
        file = self._read(name)
        items = [_parse_entry(item) for item in file.defaults]
        overriding = [item[0] == "override" for item in items if item[0] != "self"]
        if overriding != sorted(overriding):
            raise NeedsHydra
        for kind, key, option in items:
            if kind == "override":
                key = _from_the_top(key, file)
                unused |= {key} - set(chosen)
                chosen.setdefault(key, option)
        if ("self", "", None) not in items:
            items.append(("self", "", None))
        parts: list[tuple[tuple[str, ...], dict[str, Any]]] = []
        for kind, key, option in reversed(items):
            found: list[tuple[tuple[str, ...], dict[str, Any]]] = []
            if kind == "self":
                found = [(place, file.content)]
            elif kind == "file":
                sibling = str(Path(name).parent / key)
                if name == PRIMARY or self._read(sibling).package != file.package:
                    raise NeedsHydra
                found = self._parts(sibling, place, chosen, unused)
            elif kind == "group":
                if name != PRIMARY:
                    raise NeedsHydra
                unused.discard(key)
                option = chosen.get(key, option)
                if option is not None:
                    group, _, mount = key.partition("@")
                    path = f"{group}/{option}"
                    where = self._place(path, group, mount)
                    found = self._parts(path, where, chosen, unused)
            parts = found + parts
        return parts

    def _place(self, path: str, group: str, mount: str) -> tuple[str, ...]:
        package = self._read(path).package
        if mount and package is not None:
            raise NeedsHydra
        name = mount or package or group
        if name == "_global_":
            return ()
        if name.startswith(("_", ".")) or not _PLAIN_KEY.fullmatch(name):
            raise NeedsHydra
        return tuple(name.split("."))

    def _read(self, name: str) -> _File:
        if name not in self._files:
            try:
                text = (self.folder / f"{name}.yaml").read_text(encoding="utf-8")
            except (OSError, ValueError):
                raise NeedsHydra from None
            self._files[name] = _parse_file(text)
        return self._files[name]


@lru_cache(maxsize=1 << 10)
def _parse_file(text: str) -> _File:
    """A file's text; the content is shared by all that compose it and is never changed in place."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (ValueError, YAMLError, OmegaConfBaseException):
        raise NeedsHydra from None
    if not isinstance(content, dict):
        raise NeedsHydra
    defaults = content.pop("defaults", [])
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    header = _HEADER.fullmatch(first)
    if not isinstance(defaults, list) or (re.match(r"#\s*@", first) and header is None):
        raise NeedsHydra
    plain = {str(key): value for key, value in content.items()}
    return _File(header[1] if header else None, defaults, plain)


@cache
def _parser() -> OverridesParser:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    return OverridesParser.create()


@lru_cache(maxsize=1 << 12)
def _parse_override(override: str) -> Override:
    from hydra.errors import HydraException

    try:
        parsed = _parser().parse_override(override)
        if not parsed.key_or_group:
            raise HydraException("no key")
    except HydraException:
        raise LoraqError(
            f"'{override}' is not an override. Write KEY=VALUE, such as data.count=16 or "
            "method=rtn (quote values with spaces or commas: 'label=\"a, b\"')."
        ) from None
    return parsed


def _flat_keys(tree: dict[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in tree.items():
        names.append(f"{prefix}{name}")
        if isinstance(value, dict):
            names += _flat_keys(value, f"{prefix}{name}.")
    return names


def _from_the_top(key: str, file: _File) -> str:
    """The choice that `override /KEY` in a file means; a file of a group is inside its package."""
    group, absolute, mount = key.partition("@_global_.")
    if absolute:
        return group if mount == group else f"{group}@{mount}"
    if file.package != "_global_":
        raise NeedsHydra
    return key


def _parse_entry(written: Any) -> tuple[str, str, Any]:
    """An entry of a defaults list as (kind, key, option); kind: self, file, group or override."""
    if isinstance(written, str):
        if "/" in written or "@" in written or "$" in written:
            raise NeedsHydra
        return ("self", "", None) if written == "_self_" else ("file", written, None)
    if not isinstance(written, dict) or len(written) != 1:
        raise NeedsHydra
    [(key, option)] = written.items()
    kind, found = "group", re.fullmatch(r"([\w@.]+)", str(key))
    if found is None:
        kind, found = "override", re.fullmatch(r"override /([\w@.]+)", str(key))
    if found is None or "$" in str(option):
        raise NeedsHydra
    return kind, found[1], option


def _merge(base: Any, over: Any) -> Any:
    """Merge like OmegaConf: dicts key by key, other values are replaced. Returns a new dict."""
    if not isinstance(base, dict) or not isinstance(over, dict):
        containers = isinstance(base, (dict, list)) and isinstance(over, (dict, list))
        if (containers and type(base) is not type(over)) or over == "???" or "$" in str(base):
            raise NeedsHydra
        return over
    merged = dict(base)
    for name, value in over.items():
        merged[name] = _merge(base[name], value) if name in base else value
    return merged


def _apply_override(tree: dict[str, Any], path: Sequence[str], entry: Override) -> dict[str, Any]:
    """A copy of `tree` with the value of one override at `path`."""
    name = path[0]
    old, value = tree.get(name), entry.value()
    if len(path) > 1:
        if not isinstance(old, dict):
            raise NeedsHydra
        return {**tree, name: _apply_override(old, path[1:], entry)}
    if entry.is_delete():
        if old in (None, "???") or value not in (None, old):
            raise NeedsHydra
        return {key: kept for key, kept in tree.items() if key != name}
    if entry.is_force_add() or isinstance(value, dict):
        raise NeedsHydra
    if entry.is_add():
        plain = old is None and not isinstance(value, list)
    elif isinstance(old, list):
        plain = value is None or isinstance(value, list)
    else:
        plain = name in tree and (value is None or not isinstance(old, dict))
    if not plain:
        raise NeedsHydra
    return {**tree, name: value}
