"""The result and options of a metric, and helpers that all metrics use."""

from __future__ import annotations

import functools
import importlib.metadata
import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from loraq.config.run import ExtractorChoice
from loraq.errors import LoraqError, unknown
from loraq.utils.hashing import cached_hash, read_sha256sums

RESTORE = "Restore the file with `git checkout`, or install loraq again."
Direction = Literal["higher", "lower"]
Need = Literal["reference", "real", "prompts", "images"]


@dataclass(frozen=True)
class MetricResult:
    """The value of a metric over an image set.

    per_image: one value per image in order; None for a metric of the complete set.
    interval: of the value, if the metric computes it (KID); `reason`: why there is none.
    details: versions of packages, extractor and hash of its weights, counts.
    """

    name: str
    direction: Direction
    value: float
    per_image: list[float] | None = None
    interval: tuple[float, float] | None = None
    reason: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        images = "" if self.per_image is None else f", {len(self.per_image)} images"
        return f"MetricResult({self.name}={self.value:.6g}, {self.direction} is better{images})"


@dataclass(frozen=True)
class Options:
    """The options of all metrics.

    bootstrap: number of resamples of KID's interval; workers: number of threads that read images.
    """

    batch_size: int = 16
    device: str = "cpu"
    extractor: ExtractorChoice = "auto"
    bootstrap: int = 2000
    seed: int = 0
    workers: int = 0

    @classmethod
    def of(cls, given: dict[str, Any]) -> Options:
        """Options from keyword arguments; LoraqError for an unknown name or an invalid value."""
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


def packaged_hash(path: Path, remedy: str, expected: str | None = None) -> str:
    """The sha256 of a file that comes with a package; LoraqError if it is missing or damaged.

    expected: the sha256 of the published file; None: that in the SHA256SUMS of its folder.
    """
    wanted = expected or read_sha256sums(path.parent).get(path.name, "an entry in SHA256SUMS")
    found = cached_hash(path) if path.is_file() else "none"
    if found != wanted:
        raise LoraqError(
            f"'{path}' is {'missing' if found == 'none' else 'damaged'}: its sha256 is "
            f"{found[:12]}, {wanted[:12]} is expected. {remedy}"
        )
    return found


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of packages."""
    return {package: package_version(package) for package in packages}


@functools.cache
def package_version(package: str) -> str:
    """The installed version of a package; reading it takes milliseconds, so it is cached."""
    return importlib.metadata.version(package)


def mean(values: list[float]) -> float:
    """The exactly rounded mean, independent of the order of the images."""
    return math.fsum(values) / len(values)
