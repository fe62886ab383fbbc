"""What a metric gives back, what it may be told, and which packages it rests on."""

from __future__ import annotations

import importlib.metadata
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.utils.hashing import check_sha256sums


@dataclass(frozen=True)
class MetricResult:
    """A metric over an image set.

    per_image: one value per image in order, None where the metric judges the set as a whole.
    interval: of the value, where the metric works it out itself (KID); `reason` says why not.
    details: packages with versions, extractor and hash of its weights, counts.
    """

    name: str
    direction: str
    value: float
    per_image: list[float] | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What every metric may be told.

    extractor: auto, efflite0 or inception; workers: processes that read images beside this one.
    """

    batch_size: int = 16
    device: str = "cpu"
    extractor: str = "auto"
    bootstrap: int = 2000
    seed: int = 0
    workers: int = 0

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        known = [item.name for item in fields(cls)]
        for name in given:
            if name not in known:
                raise unknown("metric option", name, known)
        options = cls(**given)
        if options.batch_size < 1:
            raise LoraqError(f"batch_size = {options.batch_size}; it must be at least 1")
        if options.bootstrap < 100:
            raise LoraqError(f"bootstrap = {options.bootstrap}; at least 100 are needed")
        return options


def named_folder(metric: str, variable: str, files: Sequence[str], remedy: str) -> Path:
    """The folder of weights that an environment variable names, its files there and whole.

    remedy: where to fetch them, or what to do without; for the error where one is missing.
    """
    given = os.environ.get(variable, "")
    missing = [name for name in files if not given or not (Path(given) / name).is_file()]
    if missing:
        raise LoraqError(
            f"metric {metric} needs {' and '.join(missing)} in the folder {variable}={given!r}; "
            f"{remedy}"
        )
    check_sha256sums(Path(given), files, f"metric {metric}")
    return Path(given)


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of the packages that made a number."""
    return {package: importlib.metadata.version(package) for package in packages}


def mean(values: list[float]) -> float:
    """Exactly rounded, so that no order of the images changes it."""
    return math.fsum(values) / len(values)
