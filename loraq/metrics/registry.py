"""What is measured on images: one file a metric, looked up by its module's name.

A metric module has NAME, VERSION, DIRECTION ("higher" or "lower" is better), NEEDS ("reference":
the 16-bit model's images; "real": real images or their features; "prompts"), PER_IMAGE, and
`compute(images, <what it needs>, options) -> MetricResult`; optionally `check(options[, real])`,
which raises LoraqError before anything runs where weights or packages are missing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from types import ModuleType
from typing import Any, Literal, get_args

from loraq.errors import LoraqError, unknown
from loraq.metrics.common import summary
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options

Need = Literal["reference", "real", "prompts"]
Direction = Literal["higher", "lower"]


def metric_names() -> list[str]:
    """All metrics: the modules of `loraq/metrics/`."""
    package = importlib.import_module("loraq.metrics")
    found = pkgutil.iter_modules(package.__path__)
    return sorted(item.name for item in found if not item.ispkg and item.name != "registry")


def find_metric(name: str) -> ModuleType:
    """The metric's module; LoraqError with near matches for an unknown name."""
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
    """Raise LoraqError, before anything runs, for a metric that could not be computed here."""
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
    """One metric over an image set. `reference`: the 16-bit model's images of the same prompts.

    `real`: an ImageSet or FeatureSet that holds (at least) the real images of the same prompts.
    `options`: see `Options`; what the metric does not use is not an error, an unknown name is.
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
    """All metrics of a row as a record keeps them: value, interval, n, seen and held out apart.

    With `reference=None` (the row that makes the reference images) metrics that need one are
    entered without a value, and say why.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name in wanted:
        metric = find_metric(name)
        if metric.NEEDS == "reference" and reference is None:
            entries[metric.NAME] = summary.absent(
                metric.DIRECTION, "this row makes the images that the others are compared with"
            )
            continue

        def run(part: ImageSet, name: str = name) -> MetricResult:
            return compute(name, part, reference, real, **options)

        result = run(images)
        entries[result.name] = summary.entry(result, images, run, Options.of(options))
    return entries


def _same_names(other: Any, names: Sequence[str]) -> Any:
    """The part of an image or feature set that belongs to these prompts, in their order."""
    return other if tuple(other.names) == tuple(names) else other.of_names(names)
