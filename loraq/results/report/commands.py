"""The command that reproduces a row, derived from the configuration in its record.

command = experiment and row (or method)  +  every setting that differs in the record
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.compose import load_rows
from loraq.config.composition import Composer
from loraq.errors import LoraqError
from loraq.results.record import Record
from loraq.utils.assets import CONF
from loraq.utils.plain import to_plain

ANY = "hub"
"""The file in `conf/model/` for a model without a file of its own."""
ELSEWHERE = "…/"
"""Placeholder for the parent folders of a path, which a record does not store."""
_OWN_FILE = re.compile(r"(.+\.py)@[0-9a-f]{16}$")
_NAMES = ("row", "label", "experiment", "baseline", "method")
_OPERANDS = ("weight", "activation", "branch_weight", "branch_activation")


def row_commands(records: Sequence[Record]) -> dict[str, str]:
    """Return row → command."""
    first, composer = records[0], Composer(CONF)
    model = _model_override(first, composer)
    common = [f"experiment={first.experiment}", *model]
    rows = {} if first.experiment == "single" else _composed(common, composer)
    commands = {}
    for record in records:
        if record.row in rows:
            own, base = [*common, f"row={record.row}"], rows[record.row]
        else:
            own = [f"method={record.config['method']}", *model]
            composed = list(_composed(own, composer).values())
            base = composed[-1] if composed else {}
        commands[record.row] = " ".join(["loraq run", *own, *_changed(record, base)])
    return commands


def experiment_command(records: Sequence[Record], commands: Mapping[str, str]) -> str:
    """Return the command of all rows: the parts that their commands have in common."""
    last = records[-1]
    if last.experiment == "single":
        return commands[last.row]  # this command also runs the 16-bit row
    parts = [shlex.split(command) for command in commands.values()]
    common = [part for part in parts[0] if all(part in other for other in parts)]
    return shlex.join(common)


def _model_override(record: Record, composer: Composer) -> list[str]:
    """The override that selects the record's model, if it is not the default one."""
    name, default = record.config["model"]["name"], composer.compose([])["model"]["name"]
    if name == default:
        return []
    return [f"model={name if name in composer.groups['model'] else ANY}"]


def _composed(overrides: Sequence[str], composer: Composer) -> dict[str, dict[str, Any]]:
    """Return row → settings in the current `conf/`; empty if the overrides no longer compose.

    What `model=hub` leaves to the model's files is null: they may be on another machine.
    """
    any_model = f"model={ANY}" in overrides
    missing = ["model.path=."] if any_model else []  # differs from the record's
    try:
        rows = load_rows([*overrides, *missing], of_model=not any_model, composer=composer)
    except LoraqError:
        return {}
    return {str(config.row): to_plain(config) for config in rows}


def _changed(record: Record, base: Mapping[str, Any]) -> list[str]:
    """Return KEY=VALUE for every setting whose value in the record is not that of `base`."""
    own, plain = _leaves(record.config), _leaves(base)
    overrides = []
    for key, value in own.items():
        if key in plain and plain[key] == value:
            continue
        if own_file := _OWN_FILE.match(str(value)):  # a record stores the file's name and hash
            value = own_file[1]
            if Path(str(plain.get(key))).name == value:
                continue
        if key.split(".")[0] in (*_NAMES, "tracking"):
            continue
        if key == "model.path" and value and not str(value).startswith("asset:"):
            value = f"{ELSEWHERE}{value}"
        if key.startswith("model.call.") and key not in plain:
            key = f"+{key}"
        operand = key.removeprefix("quant.").removesuffix(".name")
        if operand in _OPERANDS:
            key = f"format@quant.{operand}"
        overrides.append(shlex.quote(f"{key}={_hydra_text(value)}"))
    return overrides


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            found |= _leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _hydra_text(value: Any) -> str:
    """Return a value in Hydra's override syntax."""
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_hydra_text, value))}]"
    if isinstance(value, str):
        plain = value.replace("_", "").replace("-", "").replace("/", "").replace(".", "")
        return value if plain.replace(":", "").isalnum() else json.dumps(value, ensure_ascii=False)
    return json.dumps(value)
