"""A metric's entry in a record: value, interval, n, for all captions and for seen and held out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.intervals import mean_interval, too_few, too_few_resampled
from loraq.metrics.common.result import MetricResult

Run = Callable[[ImageSet], MetricResult]
PARTS = {"seen": True, "held_out": False}


def metric_entry(result: MetricResult, images: ImageSet, run: Run) -> dict[str, Any]:
    """The entry of a metric; `run` computes a metric without per-image values on a part."""
    found = {
        **_part(result.per_image, result, len(images)),
        "direction": result.direction,
        "per_image": result.per_image,
        "details": result.details,
    }
    for part, wanted in PARTS.items():
        places = [i for i, seen in enumerate(images.seen or ()) if seen is wanted]
        if not places or len(places) == len(images):
            continue  # all captions are of one kind
        if result.per_image is not None:
            values = [result.per_image[place] for place in places]
            found[part] = _part(values, result, len(places))
        elif len(places) > 1:
            found[part] = _part(None, run(images.subset(places)), len(places))
    return found


def absent_entry(direction: str, reason: str) -> dict[str, Any]:
    """The entry of a metric that does not apply to a row."""
    nothing = {"value": None, "lo": None, "hi": None, "n": 0, "reason": reason}
    return {**nothing, "direction": direction, "per_image": None, "details": {}}


def with_current_intervals(entry: Mapping[str, Any], seen: Sequence[bool]) -> dict[str, Any]:
    """A record's entry with every interval that it states replaced by this version's.

    Intervals of means are computed from the entry's values. seen: one flag per image.
    """
    found, values = dict(entry), entry.get("per_image")
    if entry.get("lo") is not None:
        found |= _interval(values, entry)
    for part, wanted in PARTS.items():
        stated = entry.get(part) or {}
        if stated.get("lo") is not None:
            chosen = values and [v for v, one in zip(values, seen, strict=True) if one is wanted]
            found[part] = stated | _interval(chosen, stated)
    return found


def _part(values: list[float] | None, result: MetricResult, n: int) -> dict[str, Any]:
    if values is not None:
        return {"value": mean_interval(values).mean, "n": n, **_interval(values, {})}
    lo, hi = result.interval or (None, None)
    return {"value": result.value, "lo": lo, "hi": hi, "n": n, "reason": result.reason}


def _interval(values: Sequence[float] | None, stated: Mapping[str, Any]) -> dict[str, Any]:
    """lo, hi and the reason why there are none: of the mean of `values`, or as stated."""
    if values is not None:
        _, lo, hi = mean_interval(values)
        return {"lo": lo, "hi": hi, "reason": too_few(len(values))}
    if reason := too_few_resampled(stated["n"]):
        return {"lo": None, "hi": None, "reason": reason}
    return {}
