"""One run = one JSON: what was run, on what, and what came out. Atomic, versioned, readable alone.

Numbers are plain floats. JSON has no infinity and no NaN, so those are written as
`{"float": "inf" | "-inf" | "nan"}` and read back as floats; anything else that JSON cannot say is
refused. `tables.py`, `pictures.py` and `tracking/` read records and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.store import write_bytes, write_json

SCHEMA = 1
VOLATILE = ("created", "timings", "machine")  # what may differ between two equal runs
PACKAGES = (
    *("loraq", "torch", "torchvision", "diffusers", "transformers", "safetensors", "numpy"),
    *("scipy", "pillow", "torchmetrics", "lpips", "clean-fid"),
)
_NON_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


@dataclass(frozen=True)
class Record:
    """Results of one row (one model × method × prompt set).

    budget: bits_per_weight, branch_bits_per_weight, nbytes, rank (None where there is none).
    layers: one dict per quantised layer: layer, role, weight_error, output_error.
    images: hash, names and seen (one flag per image); `per_image` lists follow this order.
    metrics: name → value, lo, hi, n, direction, per_image, details, reason, seen{…}, held_out{…}
        (see `loraq.metrics.measure`).
    paired: metric → against, diff, lo, hi. Tables work paired differences out themselves.
    analyses: what `metrics.analyses` asked for: limits, steps, losses.
    """

    key: str
    experiment: str
    row: str
    label: str
    config: dict[str, Any]
    model_hash: str
    budget: dict[str, Any]
    layers: list[dict[str, Any]] = field(default_factory=list)
    images: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    paired: dict[str, dict[str, Any]] = field(default_factory=dict)
    analyses: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, float] = field(default_factory=dict)
    created: str = ""
    commit: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    def comparable(self) -> dict[str, Any]:
        """The record without what may differ between two runs of one config (`VOLATILE`)."""
        kept = dataclasses.asdict(self)
        for name in VOLATILE:
            del kept[name]
        return kept


def save_findings(found: dict[str, Any], path: Path) -> None:
    """Write what a bench or `loraq score` found, with its origin, as JSON; folders as needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, plain(found | origin()))


def save(record: Record, path: str | os.PathLike[str]) -> Path:
    """Write `record` to `path` whole or not at all (written beside it, synced, then renamed)."""
    path = Path(path)
    data = to_json(record).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, data)
    return path


def load(path: str | os.PathLike[str]) -> Record:
    """Read one record; LoraqError where the file is missing, damaged or of another schema."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise LoraqError(f"no record at {path}; run the experiment that makes it") from error
    try:
        return from_json(text)
    except (LoraqError, ValueError) as error:
        raise LoraqError(f"cannot read the record {path}: {error}") from error


def to_json(record: Record) -> str:
    return json.dumps(plain(record), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str) -> Record:
    data = json.loads(text, object_hook=decode)
    if not isinstance(data, dict) or "schema" not in data:
        raise LoraqError("this is not a LoRaQ record: it has no 'schema'")
    if data["schema"] != SCHEMA:
        raise LoraqError(
            f"schema {data['schema']!r}, this version reads {SCHEMA}; "
            "use the LoRaQ version that wrote it, or run the experiment again"
        )
    known = {item.name for item in dataclasses.fields(Record)}
    required = {
        item.name
        for item in dataclasses.fields(Record)
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    }
    if unexpected := sorted(set(data) - known):
        raise LoraqError(f"unknown fields {unexpected}")
    if missing := sorted(required - set(data)):
        raise LoraqError(f"missing fields {missing}")
    return Record(**data)


def plain(value: Any, where: str = "record") -> Any:
    """`value` as JSON can say it: plain dicts, lists, str, int, float, bool, None.

    Dataclasses become dicts, tuples lists, paths strings, numpy and torch scalars Python numbers,
    non-finite floats tagged objects. Anything else raises and names its place.
    """
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        number = float(value)
        return number if math.isfinite(number) else {"float": str(number)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: plain(getattr(value, item.name), f"{where}.{item.name}")
            for item in dataclasses.fields(value)
        }
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise LoraqError(f"{where}: key {name!r} is no string")
        return {name: plain(item, f"{where}.{name}") for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, f"{where}[{place}]") for place, item in enumerate(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return plain(value.item(), where)
    raise LoraqError(f"{where}: a {type(value).__name__} cannot be written to a record")


def origin(device: str = "cpu") -> dict[str, Any]:
    """The fields that say where a record comes from: created, commit, versions, machine.

    The machine is described (system, processor kind and count), never named.
    """
    import datetime
    import importlib.metadata as metadata
    import platform

    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions,
        "machine": {
            "system": platform.system(),
            "processor": platform.machine(),
            "cpus": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count(),
            "device": device,
        },
    }


def commit() -> str:
    """Commit of the checkout this package lies in, `+` where it has changes, "" outside git."""
    folder = Path(__file__).resolve().parent
    asked = []
    for command in (
        ["rev-parse", "--short=12", "HEAD"],
        ["status", "--porcelain", "--untracked-files=no", "--", "."],
    ):
        try:
            done = subprocess.run(
                ["git", "-C", str(folder), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        asked.append(done.stdout.strip())
    return asked[0] + ("+" if asked[1] else "")


def decode(item: dict[str, Any]) -> Any:
    """The tagged non-finite floats of `plain` as floats again (an `object_hook` for json)."""
    if set(item) == {"float"} and item["float"] in _NON_FINITE:
        return _NON_FINITE[item["float"]]
    return item
