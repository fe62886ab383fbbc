"""A family as a YAML file of layers, which `loraq inspect --yaml` writes and users edit.

    family: generic                     what else is known of the model
    layers:
      'blocks.*.attn1.to_q': {role: self_q, skip: false}

A name stands for the layers of all blocks; `quant.skip` names those of some. Keys of products hold
the file's name and hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loraq.errors import LoraqError, did_you_mean, near_matches, unknown
from loraq.utils.texts import first_line

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
    """The contents of a file: family, names of layers, (pattern, role) of them, those to skip."""

    family: str
    names: tuple[str, ...]
    roles: tuple[tuple[str, str], ...]
    skip: tuple[str, ...]


def read_family(path: str) -> FamilyFile:
    """The contents of a file; LoraqError for an entry that cannot be read."""
    from omegaconf import OmegaConf

    try:  # as Hydra does: a key that is given twice is an error
        held = OmegaConf.to_container(OmegaConf.create(_bytes(path).decode()))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problem = getattr(error, "problem", None) or first_line(error)
        raise LoraqError(f"'{path}' cannot be read as YAML: {problem}. {_AGAIN}") from error
    if not isinstance(held, dict) or not isinstance(held.get("layers"), dict):
        raise LoraqError(f"'{path}' has no mapping 'layers'. {_AGAIN}")
    if extra := sorted(held.keys() - {"family", "layers"}):
        raise LoraqError(f"'{path}': {unknown('setting', str(extra[0]), ['family', 'layers'])}")
    roles: dict[str, str] = {}
    names, skip = tuple(map(str, held["layers"])), []
    for name, entry in held["layers"].items():
        role, skipped = _entry(path, name, entry)
        pattern = re.escape(_EXPERT.sub("", str(name), count=1))
        if roles.setdefault(pattern, role) != role:
            raise LoraqError(
                f"'{path}': {name}: the role '{role}', and '{roles[pattern]}' in the other expert. "
                "Give both the same role."
            )
        if skipped:
            skip.append(name)
    family = str(held.get("family", "generic"))
    return FamilyFile(family, names, tuple(roles.items()), tuple(skip))


def check_names(path: str, known: Collection[str]) -> None:
    """LoraqError for an entry of a file that names none of a model's layers, `known`."""
    for name in read_family(path).names:
        if name not in known:
            guess = did_you_mean(near_matches(name, known))
            raise LoraqError(
                f"model.family={path}: '{name}' names no layer that can be quantised.{guess} An "
                f"entry is for all blocks; to leave out some of them, use quant.skip. {_AGAIN}"
            )


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
