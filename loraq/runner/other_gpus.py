"""Products that another GPU has made: this one makes them again, and the plan says so.

    OUTPUT/gpus/<key>.json    what decides the arithmetic of a GPU that has used this folder

The keys that its products have follow from this file and a row's configuration.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from loraq.errors import LoraqError
from loraq.runner.product_keys import make_row
from loraq.runner.rows import Row, Stage
from loraq.runner.store import PARTIAL, Store
from loraq.utils.files import write_json
from loraq.utils.gpu import gpu_names
from loraq.utils.hashing import key

log = logging.getLogger(__name__)

FOLDER = "gpus"
SHOWN = 4
"""Products that a message names."""


def note_gpu(store: Store, arithmetic: Mapping[str, Any]) -> None:
    """Write what decides a GPU's arithmetic into the output folder, once."""
    path = store.root / FOLDER / f"{key(arithmetic)}.json"
    if not path.is_file():
        write_json(path, dict(arithmetic))


def with_other_gpus(rows: Sequence[Row], store: Store) -> list[Row]:
    """The rows with `Row.elsewhere`: which other GPU has made, or begun, what they still need."""
    known = _known_gpus(store)
    return [dataclasses.replace(row, elsewhere=_elsewhere(row, known, store)) for row in rows]


def _elsewhere(row: Row, known: Mapping[str, dict[str, Any]], store: Store) -> dict[Stage, str]:
    found: dict[Stage, str] = {}
    if row.arithmetic is None or not row.todo:
        return found
    for other in (gpu for name, gpu in known.items() if name != key(row.arithmetic)):
        twin = make_row(row.config, other)
        for stage in row.todo:
            folder, name = twin.product(stage)
            for ending, made in ((PARTIAL, "begun"), ("", "made")):
                if store.path(folder, name + ending).is_dir():
                    found[stage] = f"{made} by {_words(other, row.arithmetic)}"
    return found


def report_other_gpus(rows: Sequence[Row]) -> None:
    """One warning for each other GPU, with the products that it has made.

    Another one if the processes of this run are on GPUs of different models.
    """
    several = os.environ.get("LOCAL_WORLD_SIZE", "1") != "1"
    if several and any(row.arithmetic for row in rows) and len(names := gpu_names()) > 1:
        log.warning(
            "this machine has GPUs of different models (%s). They share no products: each model "
            "makes all that are missing. Choose GPUs of one model (CUDA_VISIBLE_DEVICES).",
            ", ".join(names),
        )
    products: dict[str, list[str]] = {}
    for row in rows:
        for stage, words in row.elsewhere.items():
            folder, name = row.product(stage)
            products.setdefault(words, []).append(f"{folder}/{name} ({row.name})")
    for words, made in products.items():
        more = f" and {len(made) - SHOWN} more" if len(made) > SHOWN else ""
        log.warning(
            "%s: %s%s. GPUs of different models, or with other libraries, compute different bits, "
            "so that this GPU (%s) makes them for itself.",
            words,
            ", ".join(sorted(made)[:SHOWN]),
            more,
            next(row.arithmetic["name"] for row in rows if row.arithmetic),
        )


def _known_gpus(store: Store) -> dict[str, dict[str, Any]]:
    """The arithmetic of the GPUs that have used this output folder, by its key."""
    found = {}
    for path in sorted((store.root / FOLDER).glob("*.json")):
        with contextlib.suppress(OSError, ValueError, LoraqError):
            other = json.loads(path.read_text(encoding="utf-8"))
            if key(other) == path.stem:  # else it is damaged
                found[path.stem] = other
    return found


def _words(other: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """The other GPU's model, or what else differs if it is the same."""
    if other.get("name") != own.get("name"):
        return str(other.get("name"))
    before, now = _flat(other), _flat(own)
    differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    changes = (f"{name} {before.get(name)}, now {now.get(name)}" for name in differing)
    return f"{other.get('name')} with {'; '.join(changes)}"


def _flat(tree: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value) if isinstance(value, Mapping) else {name: value}
    return found
