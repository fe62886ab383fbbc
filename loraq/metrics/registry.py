"""Find, check and compute metrics by name; a metric is a module of `loraq/metrics/`.

A metric module defines NAME, VERSION, DIRECTION ("higher" or "lower" is better), NEEDS
("reference": the 16-bit model's images; "real": real images or their features; "prompts"),
PER_IMAGE, and `compute(images, <what it needs>, options) -> MetricResult`; optionally
`check(options[, real])`, which raises LoraqError before a run if weights or packages are missing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any, get_args

from loraq.errors import LoraqError, unknown
from loraq.metrics.common import summary
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import Direction, MetricResult, Need, Options


def metric_names() -> list[str]:
    """The names of all metrics, sorted."""
    package = importlib.import_module("loraq.metrics")
    found = pkgutil.iter_modules(package.__path__)
    return sorted(item.name for item in found if not item.ispkg and item.name != "registry")


def find_metric(name: str) -> ModuleType:
    """The module of a metric; LoraqError with near matches for an unknown name."""
    if name not in metric_names():
        raise unknown("metric", name, metric_names())
    found = importlib.import_module(f"loraq.metrics.{name}")
    for constant, allowed in (
        ("NAME", (name,)),
        ("NEEDS", get_args(Need)),
        ("DIRECTION", get_args(Direction)),
    ):
        value = getattr(found, constant, None)
        if value not in allowed:
            raise LoraqError(
                f"loraq/metrics/{name}.py: {constant} is {value!r}. Give {' or '.join(allowed)}."
            )
    return found


def check_metrics(wanted: Sequence[str], real: Any = None, **options: Any) -> None:
    """LoraqError for a metric that cannot be computed, for example without its weights."""
    chosen = Options.of(options)
    for name in wanted:
        metric = find_metric(name)
        if not hasattr(metric, "check"):
            continue
        if metric.NEEDS == "real":
            metric.check(chosen, real)
        else:
            metric.check(chosen)


def compute(
    name: str,
    images: ImageSet,
    reference: ImageSet | None = None,
    real: Any = None,
    **options: Any,
) -> MetricResult:
    """Compute one metric over an image set.

    reference: the 16-bit model's images; must contain the names of `images`.
    real: an ImageSet or FeatureSet of real images; must contain the names of `images`.
    options: fields of `Options`; LoraqError for an unknown name, unused ones are ignored.
    """
    metric, chosen = find_metric(name), Options.of(options)
    if metric.NEEDS == "reference":
        if reference is None:
            raise LoraqError(f"metric {name} needs the 16-bit model's images (reference=…)")
        return metric.compute(images, _same_names(reference, images.names), chosen)
    if metric.NEEDS == "real":
        if real is None:
            raise LoraqError(f"metric {name} needs real images or their features (real=…)")
        return metric.compute(images, _same_names(real, images.names), chosen)
    if images.prompts is None:
        raise LoraqError(f"metric {name} needs the prompts of the images (ImageSet.prompts)")
    return metric.compute(images, chosen)


def measure(
    wanted: Sequence[str],
    images: ImageSet,
    reference: ImageSet | None = None,
    real: Any = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """The record's entries of all metrics: value, interval, n; also per part, seen and held out.

    With `reference=None` (the row of the reference images) the entries of metrics that need a
    reference have no value, but a reason.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name in wanted:
        metric = find_metric(name)
        if metric.NEEDS == "reference" and reference is None:
            entries[metric.NAME] = summary.absent_entry(
                metric.DIRECTION, "this row makes the images that the others are compared with"
            )
            continue

        def run(part: ImageSet, name: str = name) -> MetricResult:
            return compute(name, part, reference, real, **options)

        result = run(images)
        entries[result.name] = summary.metric_entry(result, images, run)
    return entries


def _same_names(other: Any, names: Sequence[str]) -> Any:
    """The part of an image or feature set with these names, in their order."""
    return other if tuple(other.names) == tuple(names) else other.of_names(names)
