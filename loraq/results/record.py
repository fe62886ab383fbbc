"""One run = one JSON: what was run, on what, and what came out. Atomic, versioned, readable alone.

Numbers are plain floats. JSON has no infinity and no NaN, so those are written as
`{"float": "inf" | "-inf" | "nan"}` and read back as floats; anything else that JSON cannot say is
refused. `tables.py`, `pictures.py` and `tracking/` read records and nothing else.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.assets import CONF, PACKAGE
from loraq.utils.files import write_bytes, write_json
from loraq.utils.plain import decode_float, to_plain

SCHEMA = 1
VOLATILE = ("created", "timings", "machine")  # what may differ between two equal runs
PACKAGES = (
    *("loraq", "torch", "torchvision", "diffusers", "transformers", "safetensors", "numpy"),
    *("scipy", "pillow", "torchmetrics", "lpips", "clean-fid"),
)


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
    write_json(path, to_plain(found | origin(), where="record"))


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
    return (
        json.dumps(to_plain(record, where="record"), indent=1, ensure_ascii=False, allow_nan=False)
        + "\n"
    )


def from_json(text: str) -> Record:
    data = json.loads(text, object_hook=decode_float)
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
    """Commit of this package's checkout, "" outside git; `+` where code or `conf/` has changes.

    New files count as changes where they are code or configuration: a run may have read them.
    """
    parts = PACKAGE, CONF.resolve()
    looked_at = [f":(glob){part}/**/*{suffix}" for part in parts for suffix in (".py", ".yaml")]
    asked = []
    for command in (
        ["rev-parse", "--short=12", "HEAD"],
        ["status", "--porcelain", "--untracked-files=all", "--", *looked_at],
    ):
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        asked.append(done.stdout.strip())
    return asked[0] + ("+" if asked[1] else "")
