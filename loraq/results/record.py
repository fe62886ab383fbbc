"""Records: one JSON file per row with configuration, environment and results.

Numbers are plain floats. JSON has no infinity and no NaN, so these are written as
`{"float": "inf" | "-inf" | "nan"}` and read back as floats; any other value that JSON cannot
represent raises LoraqError. Files are versioned (`SCHEMA`) and written atomically.

Reading a record computes its intervals anew from the values per image, so that tables, plots and
reports show intervals of one kind, whichever version wrote the record.
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
from loraq.metrics.common.summary import with_current_intervals
from loraq.utils.assets import CONF, PACKAGE
from loraq.utils.files import write_json, write_text
from loraq.utils.machine import describe_machine
from loraq.utils.plain import parse_json, to_plain
from loraq.utils.shape import Shape, check_shape

SCHEMA = 1
VOLATILE = ("created", "timings", "machine")  # fields that may differ between equal runs
PACKAGES = (
    "loraq",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "scipy",
    "pillow",
    "torchmetrics",
    "lpips",
    "clean-fid",
)

_NUMBER = (float, None)
_INTERVAL: Shape = {
    **{"?value": _NUMBER, "?lo": _NUMBER, "?hi": _NUMBER},
    **{"n": int, "?reason": (str, None)},
}
_METRIC: Shape = {
    **_INTERVAL,
    **{"?direction": str, "?per_image": ([float], None)},
    **{"?seen": (_INTERVAL, None), "?held_out": (_INTERVAL, None)},
    "?details": {"?identical": (int, None), "?cap": _NUMBER, "?data_range": (float, [float])},
}
RECORD: Shape = {
    **{"key": str, "experiment": str, "row": str, "label": str, "config": dict, "model_hash": str},
    "budget": {
        **{"?bits_per_weight": _NUMBER, "?branch_bits_per_weight": _NUMBER},
        **{"?nbytes": (int, None), "?rank": (int, str, None)},
    },
    "?layers": [{"layer": str, "role": str, "?weight_error": _NUMBER, "?output_error": _NUMBER}],
    "?images": {
        **{"?hash": str, "?names": [str], "?seen": [bool], "?kind": str},
        **{"?frames": (int, None), "?fps": _NUMBER, "?seconds": _NUMBER},
        **{"?rate": int, "?channels": int},
    },
    "?metrics": {"*": _METRIC},
    "?paired": {"*": dict},
    "?analyses": {
        "?limits": {"gaussian": float, "shannon": float, "spectral": float},
        **{"?steps": {"*": [float]}, "?losses": {"*": [float]}, "?seconds": {"*": float}},
    },
    **{"?timings": {"*": float}, "?created": str, "?commit": str, "?versions": {"*": str}},
    "?machine": {
        **{"?device": str, "?processor": str, "?model": str, "?cpus": (int, None)},
        "?gpu": {
            **{"name": str, "count": int, "memory": int, "driver": str},
            "libraries": {"*": str},
        },
    },
}
"""What tables and reports read of a record (`loraq/utils/shape.py`)."""


@dataclass(frozen=True)
class Record:
    """Results of one row (one model × method × prompt set).

    budget: bits_per_weight, branch_bits_per_weight, nbytes, rank (None without a branch).
    layers: one dict per quantised layer: layer, role, weight_error, output_error.
    images: hash, names and seen (one flag per image); `per_image` lists have this order. Also
        `one_colour`, the names of the images whose pixels are all equal, if there are any. Of
        videos and clips of sound, `kind` and `seconds` of one; `frames` and `fps` of a video,
        `rate` (samples per second) and `channels` of a clip.
    metrics: name → value, lo, hi, n, direction, version, per_image, details, reason, seen{…},
        held_out{…} (see `loraq.metrics.measure`). Earlier releases recorded no version.
    paired: metric → against, diff, lo, hi. Tables compute paired differences themselves.
    analyses: results of the analyses set in `metrics.analyses`: limits, steps, losses.
    machine: what ran the row (`utils/machine.py`). Earlier releases recorded no processor's model.
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

    def __repr__(self) -> str:
        values = {name: entry.get("value") for name, entry in self.metrics.items()}
        shown = [f"{name}={value:.4g}" for name, value in values.items() if value is not None]
        where = f"{self.experiment}/{self.row}"
        return f"Record({', '.join([repr(where), f'key={self.key!r}', *shown])})"

    def comparable(self) -> dict[str, Any]:
        """Return the record without the fields that may differ between equal runs (`VOLATILE`)."""
        kept = dataclasses.asdict(self)
        for name in VOLATILE:
            del kept[name]
        return kept


def save_findings(found: dict[str, Any], path: Path) -> None:
    """Write the results of a benchmark or `loraq score`, with `provenance()`, to a JSON file."""
    write_json(path, to_plain(found | provenance(), where="record"))


def save_record(record: Record, path: str | os.PathLike[str]) -> Path:
    """Write `record` to `path` atomically: to a temporary file, synced, then renamed."""
    path = Path(path)
    write_text(path, to_json(record))
    return path


def load_record(path: str | os.PathLike[str]) -> Record:
    """Read one record; LoraqError if the file is missing, damaged or has another schema."""
    try:
        return from_json(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoraqError(f"No record at {path}. Run the experiment that writes it.") from error
    except (LoraqError, ValueError, OSError) as error:
        raise LoraqError(
            f"Cannot read the record {path}: {error}. Restore it, or run its experiment again."
        ) from error


def to_json(record: Record) -> str:
    """Return the record as indented JSON; LoraqError for a value that JSON cannot represent."""
    return (
        json.dumps(to_plain(record, where="record"), indent=1, ensure_ascii=False, allow_nan=False)
        + "\n"
    )


def from_json(text: str) -> Record:
    """Parse a record; LoraqError for another schema, and for fields that are not as `Record` says.

    ValueError if the text is not JSON.
    """
    data = parse_json(text, floats=True)
    if not isinstance(data, dict) or "schema" not in data:
        raise LoraqError("this is not a LoRaQ record: it has no field 'schema'")
    if data["schema"] != SCHEMA:
        raise LoraqError(
            f"schema {data['schema']!r}, but this version reads {SCHEMA}. Use the LoRaQ version "
            "that wrote it, or run the experiment again"
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
    check_shape(data, RECORD, "record")
    json.dumps(data, ensure_ascii=False).encode()  # ValueError for half of a surrogate pair
    record = Record(**data)
    seen = record.images.get("seen") or ()
    count = len(record.images.get("names", ()))
    per_image = {f"metrics.{n}.per_image": m.get("per_image") for n, m in record.metrics.items()}
    for name, values in {"images.seen": seen, **per_image}.items():
        if values and len(values) != count:
            raise LoraqError(f"record.{name} has {len(values)} values for {count} images")
    metrics = {name: with_current_intervals(each, seen) for name, each in record.metrics.items()}
    return dataclasses.replace(record, metrics=metrics)


def provenance(device: str = "cpu") -> dict[str, Any]:
    """Return the provenance fields of a record: created, commit, versions, machine.

    device: "cpu" or "cuda", what computed the values. The machine's host name is not stored.
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
        "commit": checkout_commit(),
        "versions": versions,
        "machine": describe_machine(device),
    }


def checkout_commit() -> str:
    """Return the commit of this package's checkout, with `+` if code or `conf/` has changes.

    Untracked .py and .yaml files count as changes, because a run may read them. "" outside git.
    """
    folders = PACKAGE, CONF.resolve()
    patterns = [f":(glob){part}/**/*{suffix}" for part in folders for suffix in (".py", ".yaml")]
    answers = []
    for command in (
        ["rev-parse", "--short=12", "HEAD"],
        ["status", "--porcelain", "--untracked-files=all", "--", *patterns],
    ):
        try:
            done = subprocess.run(
                ["git", "-C", str(PACKAGE), *command], capture_output=True, text=True, timeout=10
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        if done.returncode:
            return ""
        answers.append(done.stdout.strip())
    return answers[0] + ("+" if answers[1] else "")
