"""A metric's entry in a record: value, interval, n, for all captions and for seen and held out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from loraq.metrics.common import bootstrap
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options

Run = Callable[[ImageSet], MetricResult]


def metric_entry(
    result: MetricResult, images: ImageSet, run: Run, options: Options
) -> dict[str, Any]:
    """The entry of a metric; `run` computes a metric without per-image values on a part."""
    found = {
        **_part(result.per_image, result, len(images), options),
        "direction": result.direction,
        "per_image": result.per_image,
        "details": result.details,
    }
    for part, wanted in (("seen", True), ("held_out", False)):
        places = [i for i, seen in enumerate(images.seen or ()) if seen is wanted]
        if not places or len(places) == len(images):
            continue  # all captions are of one kind
        if result.per_image is not None:
            values = [result.per_image[place] for place in places]
            found[part] = _part(values, result, len(places), options)
        elif len(places) > 1:
            found[part] = _part(None, run(images.subset(places)), len(places), options)
    return found


def absent_entry(direction: str, reason: str) -> dict[str, Any]:
    """The entry of a metric that does not apply to a row."""
    nothing = {"value": None, "lo": None, "hi": None, "n": 0, "reason": reason}
    return {**nothing, "direction": direction, "per_image": None, "details": {}}


def _part(
    values: list[float] | None, result: MetricResult, n: int, options: Options
) -> dict[str, Any]:
    if values is not None:
        value, lo, hi = bootstrap.bootstrap_interval(values, options.bootstrap, options.seed)
        reason = "" if lo is not None else "one image allows no interval"
    else:
        value, reason = result.value, result.reason
        lo, hi = result.interval or (None, None)
    return {"value": value, "lo": lo, "hi": hi, "n": n, "reason": reason}
