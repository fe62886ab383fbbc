"""Find, check and compute metrics by name; a metric is a module of `loraq/metrics/`.

A metric module defines NAME, VERSION, DIRECTION ("higher" or "lower" is better), NEEDS
("reference": the 16-bit model's images; "real": real images or their features; "prompts"; "images":
nothing else), PER_IMAGE, ON_DEVICE (the run's device computes all of it; without it, the host's
threads are in the keys of a run on a GPU), `sources(options)`: what computes it, that is versions
of packages and hashes of weights (LoraqError if they are missing or damaged; published weights may
still be downloaded), and `compute(images, <what it needs>, options) -> MetricResult`. COUNTED may
name details that are counts, which add up over parts of the images; EXTRACTOR the extractor of the
features from which the values of all images are computed at once; KINDS the kinds of output that
it reads, images alone without it. Of a video, a metric of images reads every frame, and the video's
value is the mean.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, get_args

import numpy as np

from loraq.config.run import ExtractorChoice
from loraq.errors import LoraqError, unknown
from loraq.metrics.common import summary
from loraq.metrics.common.features import ExtractorName, choose_extractor
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.kinds import check_same_kind
from loraq.metrics.common.published import check_reachable
from loraq.metrics.common.result import Direction, MetricResult, Need, Options, mean
from loraq.utils.kinds import UNITS, Kind

DEFAULTS: dict[Kind, str] = {"image": "paired", "video": "video", "audio": "audio"}
"""Kind of output → the file in `conf/metrics/` whose metrics read it."""
AUTO = "auto"
_AUTO: dict[Kind, tuple[str, ...]] = {
    **dict.fromkeys(("image", "video"), ("psnr", "lpips", "ssim")),
    "audio": ("log_stft", "snr"),
}
"""Kind of output → the metrics of its file in `DEFAULTS`."""


def names_for(wanted: Sequence[str], kind: Kind) -> tuple[str, ...]:
    """The names of metrics, `auto` replaced by those that compare this kind with a reference."""
    found = (name for one in wanted for name in (_AUTO[kind] if one == AUTO else (one,)))
    return tuple(dict.fromkeys(found))


@functools.cache
def metric_names() -> tuple[str, ...]:
    """The names of all metrics, sorted."""
    package = importlib.import_module("loraq.metrics")
    found = pkgutil.iter_modules(package.__path__)
    return tuple(sorted(item.name for item in found if not item.ispkg and item.name != "registry"))


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


def needs_real(wanted: Sequence[str]) -> list[str]:
    """Those of the metrics that compare with real images."""
    return [name for name in wanted if find_metric(name).NEEDS == "real"]


def needs_host(wanted: Sequence[str]) -> list[str]:
    """Those of the metrics of which, on a GPU, the host computes a part."""
    return [name for name in wanted if not getattr(find_metric(name), "ON_DEVICE", False)]


def metric_sources(
    wanted: Sequence[str], real: Any = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """What computes each metric: its version, versions of packages, hashes of weights.

    Belongs to the keys of measured values. LoraqError if a metric cannot be computed, for example
    because its weights are damaged. Published weights that are not downloaded yet are no error:
    their hashes are known.
    """
    found = {}
    for name in wanted:
        metric = find_metric(name)
        chosen = _resolved(metric, real, Options.of(options))
        found[name] = {"version": metric.VERSION, **metric.sources(chosen)}
    return found


def check_metrics(
    wanted: Sequence[str],
    images: int,
    side: int | None,
    real: Any = None,
    kind: Kind = "image",
    **options: Any,
) -> None:
    """LoraqError for a metric that cannot be computed, for example without its weights.

    images: how many; side: the shorter one in pixels, or the samples of a clip; None: not known
    yet. Published weights that are not downloaded yet are an error only without network access.
    """
    check_kind(wanted, kind)
    metric_sources(wanted, real, **options)
    check_reachable(wanted, options.get("extractor", "auto"))
    for metric in map(find_metric, wanted):
        if images < 2 and not metric.PER_IMAGE:
            raise LoraqError(
                f"metrics.names: {metric.NAME} compares distributions, which needs 2 images or "
                f"more, and there is {images}. Set data.count=2 or more, or leave {metric.NAME} "
                "out (metrics=paired)."
            )
        smallest = getattr(metric, "SMALLEST", 1)
        if side is not None and side < smallest:
            needed = "clips of {} samples" if kind == "audio" else "images of {} pixels a side"
            raise LoraqError(
                f"metrics.names: {metric.NAME} needs {needed.format(smallest)} or more, "
                f"and these have {side}. Set a larger size, or leave {metric.NAME} out."
            )


def kinds_of(metric: ModuleType) -> tuple[Kind, ...]:
    """The kinds of output that a metric reads."""
    return getattr(metric, "KINDS", ("image",))


def check_kind(wanted: Sequence[str], kind: Kind) -> None:
    """LoraqError for metrics that do not read this kind of output, with those that do."""
    metrics = [find_metric(name) for name in wanted]
    if not (others := [metric for metric in metrics if kind not in kinds_of(metric)]):
        return
    kept = [metric.NAME for metric in metrics if metric not in others]
    reads = " or ".join(dict.fromkeys(UNITS[one] for metric in others for one in kinds_of(metric)))
    keep = f", or metrics.names=[{','.join(kept)}] to keep the others" if kept else ""
    raise LoraqError(
        f"metrics.names: {', '.join(metric.NAME for metric in others)} "
        f"compute{'s' * (len(others) == 1)} values of {reads}, and these are {UNITS[kind]}. Set "
        f"metrics={DEFAULTS[kind]}{keep}."
    )


def distribution_extractors(
    wanted: Sequence[str], need: Need, real: Any, extractor: ExtractorChoice
) -> list[ExtractorName]:
    """The extractors of the features in which metrics of distributions compare with `need`."""
    options = Options(extractor=extractor)
    metrics = [metric for metric in map(find_metric, wanted) if need == metric.NEEDS]
    found = [
        choose_extractor(_resolved(metric, real, options).extractor)
        for metric in metrics
        if not metric.PER_IMAGE
    ]
    return list(dict.fromkeys(found))


def _resolved(metric: ModuleType, real: Any, options: Options) -> Options:
    """The options with the feature extractor that `auto` means, for a metric that uses it."""
    if metric.NEEDS != "real":
        return options
    return dataclasses.replace(options, extractor=choose_extractor(options.extractor, real))


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
    metric = find_metric(name)
    check_kind((name,), images.KIND)
    if metric.NEEDS == "reference" and reference is None:
        raise LoraqError(f"metric {name} needs the 16-bit model's images (reference=…)")
    if metric.NEEDS == "real" and real is None:
        raise LoraqError(f"metric {name} needs real images or their features (real=…)")
    if metric.NEEDS == "prompts" and images.prompts is None:
        raise LoraqError(f"metric {name} needs the prompts of the images (ImageSet.prompts)")
    chosen = _resolved(metric, real, Options.of(options))
    other = {"reference": reference, "real": real}.get(metric.NEEDS)
    if isinstance(other, ImageSet):
        check_same_kind(images, other)
    needed = [] if other is None else [_same_names(other, images.names)]
    result: MetricResult = metric.compute(images, *needed, chosen)
    if result.per_image is not None and images.KIND == "video":
        values = images.per_item(result.per_image)
        result = dataclasses.replace(result, value=mean(values), per_image=values)
    if not np.isfinite([result.value, *(result.per_image or ())]).all():
        raise LoraqError(
            f"metric {name} gives {result.value}: an image or the metric's weights make values "
            "that are not finite. Look at the images, and restore the weights."
        )
    return dataclasses.replace(result, details={**metric.sources(chosen), **result.details})


def measure(
    wanted: Sequence[str],
    images: ImageSet,
    reference: ImageSet | None = None,
    real: Any = None,
    no_reference: str = "this row makes the images that the others are compared with",
    known: Mapping[str, MetricResult] | None = None,
    **options: Any,
) -> dict[str, dict[str, Any]]:
    """The record's entries of all metrics: value, interval, n; also per part, seen and held out.

    no_reference: with `reference=None`, the reason why metrics that need one have no value.
    known: results that are there already, by the metric's name.
    """
    entries: dict[str, dict[str, Any]] = {}
    for name in wanted:
        metric = find_metric(name)
        if metric.NEEDS == "reference" and reference is None:
            chosen = _resolved(metric, real, Options.of(options))
            shown = metric.result_name(chosen) if hasattr(metric, "result_name") else metric.NAME
            entries[shown] = summary.absent_entry(metric.DIRECTION, no_reference)
            continue

        def run(part: ImageSet, name: str = name) -> MetricResult:
            return compute(name, part, reference, real, **options)

        result = (known or {}).get(name) or run(images)
        entry = summary.metric_entry(result, images, run)
        entries[result.name] = {**entry, "version": metric.VERSION}
    return entries


def _same_names(other: Any, names: Sequence[str]) -> Any:
    """The part of an image or feature set with these names, in their order."""
    return other if tuple(other.names) == tuple(names) else other.of_names(names)
