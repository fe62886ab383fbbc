"""The command that makes one row again, worked out from the row's own configuration.

command = experiment and row (or method)  +  every setting in which the record differs from them
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.compose import config_groups, load_rows
from loraq.errors import LoraqError
from loraq.results.record import Record
from loraq.utils.plain import to_plain

ELSEWHERE = "…/"
"""Stands before the name of a folder whose place a record does not hold."""
_OWN_FILE = re.compile(r"(.+\.py)@[0-9a-f]{16}$")
_NAMES = ("row", "label", "experiment", "baseline", "method")
_OPERANDS = ("weight", "activation", "branch_weight", "branch_activation")


def row_commands(records: Sequence[Record]) -> dict[str, str]:
    """row → its command; rows of one experiment are composed once."""
    first = records[0]
    front = _front(first)
    rows = {} if first.experiment == "single" else _composed(front)
    commands = {}
    for record in records:
        if record.row in rows:
            own, base = [*front, f"row={record.row}"], rows[record.row]
        else:
            own = [f"method={record.config['method']}", *_model(record)]
            base = list(_composed(own).values())[-1] if _composed(own) else {}
        commands[record.row] = " ".join(["loraq run", *own, *_changed(record, base)])
    return commands


def experiment_command(records: Sequence[Record], commands: Mapping[str, str]) -> str:
    """The command of all rows: what their own commands have in common, but for the row."""
    last = records[-1]
    if last.experiment == "single":
        return commands[last.row]  # it makes the 16-bit row as well
    parts = [shlex.split(command) for command in commands.values()]
    common = [part for part in parts[0] if all(part in other for other in parts)]
    return shlex.join(common)


def _front(record: Record) -> list[str]:
    return [f"experiment={record.experiment}", *_model(record)]


def _model(record: Record) -> list[str]:
    name = str(record.config["model"]["name"])
    default = "tiny_pixart"
    return [f"model={name}"] if name != default and name in config_groups()["model"] else []


def _composed(overrides: Sequence[str]) -> dict[str, dict[str, Any]]:
    """row → its settings as `conf/` has them today; empty where it no longer has them."""
    try:
        return {str(config.row): to_plain(config) for config in load_rows(overrides)}
    except LoraqError:
        return {}


def _changed(record: Record, base: Mapping[str, Any]) -> list[str]:
    """KEY=VALUE of every setting that is another one in the record."""
    own, plain = _leaves(record.config), _leaves(base)
    overrides = []
    for key, value in own.items():
        if key in plain and plain[key] == value:
            continue
        if own_file := _OWN_FILE.match(str(value)):  # a record knows its name and its hash
            value = own_file[1]
            if Path(str(plain.get(key))).name == value:
                continue
        if key.split(".")[0] in (*_NAMES, "tracking"):
            continue
        if key == "model.path" and value and not str(value).startswith("asset:"):
            value = f"{ELSEWHERE}{value}"
        operand = key.removeprefix("quant.").removesuffix(".name")
        if operand in _OPERANDS:
            key = f"format@quant.{operand}"
        overrides.append(shlex.quote(f"{key}={_text(value)}"))
    return overrides


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _text(value: Any) -> str:
    """A value in Hydra's syntax."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_text, value))}]"
    if isinstance(value, str):
        plain = value.replace("_", "").replace("-", "").replace("/", "").replace(".", "")
        return value if plain.replace(":", "").isalnum() else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
