"""The metrics' values of single images and the images' features, shared by processes in parts.

A part is a fixed range of the images, a whole number of every metric's batches, so that values do
not depend on the number of processes. Distances of distributions are computed from the features of
all parts afterwards.

Shapes: N images, D features.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loraq import metrics
from loraq.metrics.common.features import (
    ExtractorName,
    FeatureSet,
    extractor_sources,
    features_of,
)
from loraq.metrics.common.image_set import ImageSet, compared_batch
from loraq.metrics.common.result import MetricResult, Options, mean
from loraq.runner.store import Store
from loraq.utils.kinds import UNITS
from loraq.utils.parts import Part, make_parts, unfinished
from loraq.utils.pieces import write_piece


def score_images(
    store: Store,
    product: tuple[str, str],
    images: ImageSet,
    reference: ImageSet | None,
    names: Sequence[str],
    extractors: Sequence[ExtractorName],
    options: Mapping[str, Any],
    progress: str | None = None,
) -> dict[str, MetricResult]:
    """The results of metrics with one value per image; sets `images.features`.

    product: (stage, key) in the store, which determines everything else. names: of metrics that
    read `images` and `reference` alone. progress: label of the bar; None: no bar.
    """
    from tqdm import tqdm

    ranges = _ranges(images, Options.of(dict(options)))
    files = [f"{number:05d}.safetensors" for number in range(len(ranges))]
    info = {"kind": product[0], "units": len(images)}
    with store.share(*product, info, files) as folder:
        if folder is not None:
            unit = UNITS[images.KIND][:-1]
            bar = tqdm(total=len(images), desc=progress, unit=unit, disable=progress is None)

            def make(part: Part) -> Callable[[], object]:
                places = ranges[part.number]
                some = images.subset(places)
                other = None if reference is None else reference.subset(places)
                data = _measured(some, other, names, extractors, options)
                return functools.partial(write_piece, part.files[0], data)

            parts = [Part(n, file[:5], [folder / file]) for n, file in enumerate(files)]
            todo = unfinished(parts)
            claim = functools.partial(store.locks.part, *product)
            with bar:
                bar.update(len(images) - sum(len(ranges[part.number]) for part in todo))
                make_parts(folder, todo, claim, make, lambda p: bar.update(len(ranges[p.number])))
    return _joined(store.path(*product), files, images, names, extractors)


def _ranges(images: ImageSet, options: Options) -> list[range]:
    size = images.PART
    if images.KIND == "image":  # batches of videos and clips never hold two of them
        size = math.lcm(options.batch_size, compared_batch(options, images.area))
        size *= max(1, images.PART // size)
    return [range(len(images))[start : start + size] for start in range(0, len(images), size)]


def _measured(
    images: ImageSet,
    reference: ImageSet | None,
    names: Sequence[str],
    extractors: Sequence[ExtractorName],
    options: Mapping[str, Any],
) -> bytes:
    """A safetensors file with the values and features of a part."""
    from safetensors.numpy import save

    tensors, details = {}, {}
    for extractor in extractors:
        found = features_of(images, extractor, Options.of(dict(options)))
        tensors[f"features {extractor}"] = np.ascontiguousarray(found.values)
    for name in names:
        result = metrics.compute(name, images, reference, **options)
        tensors[name] = np.array(result.per_image, np.float64)
        details[name] = result.details
    return save(tensors, {"details": json.dumps(details)})


def _joined(
    folder: Path,
    files: Sequence[str],
    images: ImageSet,
    names: Sequence[str],
    extractors: Sequence[ExtractorName],
) -> dict[str, MetricResult]:
    from safetensors import safe_open

    parts, details = [], []
    for file in files:
        with safe_open(folder / file, "np") as stream:
            parts.append({name: stream.get_tensor(name) for name in stream.keys()})  # noqa: SIM118
            details.append(json.loads(stream.metadata()["details"]))
    for extractor in extractors:
        values = np.concatenate([part[f"features {extractor}"] for part in parts])
        images.features[extractor] = FeatureSet(
            images.names, values, extractor, extractor_sources(extractor)
        )
    found = {}
    for name in names:
        metric = metrics.find_metric(name)
        values = np.concatenate([part[name] for part in parts]).tolist()
        counted = {
            count: sum(part[name][count] for part in details)
            for count in getattr(metric, "COUNTED", ())
        }
        about = {**details[0][name], **counted}
        found[name] = MetricResult(name, metric.DIRECTION, mean(values), values, details=about)
    return found
