"""A family as a YAML file of layers, which `loraq inspect --yaml` writes and users edit.

    family: generic                     what else is known of the model
    layers:
      'blocks.*.attn1.to_q': {role: self_q, skip: false}

A name stands for the layers of all blocks. Keys of products hold the file's name and hash.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loraq.errors import LoraqError, unknown

ENDINGS = (".yaml", ".yml")
_EXPERT = re.compile(r"transformer(_\d+)?\.")
_ROLE = re.compile(r"[a-z0-9_]+")


def is_family_file(name: str) -> bool:
    """Whether `model.family` is the path of a file rather than a name."""
    return name.endswith(ENDINGS)


def family_label(name: str) -> str:
    """The family in keys: its name, or FILE@HASH."""
    if not is_family_file(name):
        return name
    return f"{Path(name).name}@{hashlib.sha256(_bytes(name)).hexdigest()[:16]}"


@dataclass(frozen=True)
class FamilyFile:
    """The contents of a file: name of the family, (pattern, role) of layers, those to skip."""

    family: str
    roles: tuple[tuple[str, str], ...]
    skip: tuple[str, ...]


def read_family(path: str) -> FamilyFile:
    """The contents of a file; LoraqError for an entry that cannot be read."""
    try:
        held = yaml.safe_load(_bytes(path)) or {}
    except yaml.YAMLError as error:
        raise LoraqError(f"'{path}' is no YAML: {str(error).splitlines()[0]}. {_AGAIN}") from error
    if not isinstance(held, dict) or not isinstance(held.get("layers"), dict):
        raise LoraqError(f"'{path}' has no mapping 'layers'. {_AGAIN}")
    if extra := sorted(held.keys() - {"family", "layers"}):
        raise LoraqError(f"'{path}': {unknown('setting', str(extra[0]), ['family', 'layers'])}")
    roles, skip = [], []
    for name, entry in held["layers"].items():
        role, skipped = _entry(path, name, entry)
        roles.append((re.escape(_EXPERT.sub("", str(name), count=1)), role))
        if skipped:
            skip.append(name)
    return FamilyFile(str(held.get("family", "generic")), tuple(roles), tuple(skip))


def family_text(family: str, title: str, layers: dict[str, tuple[str, bool]]) -> str:
    """The contents of a file; layers: starred name → (role, whether it stays in 16 bits)."""
    lines = [f"# {title}", "# Edit roles and skip, then run with model.family=THIS_FILE."]
    lines.append(f"family: {family}\nlayers:")
    for name, (role, skip) in layers.items():
        lines.append(f"  '{name}': {{role: {role}, skip: {str(skip).lower()}}}")
    return "\n".join(lines) + "\n"


_AGAIN = "Write one with: loraq inspect model=… --yaml FILE"


def _entry(path: str, name: Any, entry: Any) -> tuple[str, bool]:
    fits = isinstance(entry, dict) and entry.keys() <= {"role", "skip"} and "role" in entry
    if not fits or not isinstance(entry.get("skip", False), bool):
        raise LoraqError(f"'{path}': {name}: {entry!r} is not {{role: NAME, skip: true or false}}.")
    role = str(entry["role"])
    if not _ROLE.fullmatch(role):
        raise LoraqError(
            f"'{path}': {name}: the role '{role}' is part of file names. Use a-z, 0-9 and _."
        )
    return role, entry.get("skip", False)


def _bytes(path: str) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise LoraqError(f"model.family={path}: {error.strerror}. {_AGAIN}") from error
