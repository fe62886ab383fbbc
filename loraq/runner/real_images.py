"""The real images of a run's prompts, and their features, cached by the images' hashes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from loraq.config import Config
from loraq.data import data_prompts, prompts_path, real_image_paths
from loraq.errors import LoraqError
from loraq.metrics.common.features import (
    ExtractorName,
    FeatureSet,
    extractor_sources,
    load_features,
)
from loraq.metrics.common.image_set import ImageSet
from loraq.runner.rows import Row
from loraq.runner.scores import score_images
from loraq.runner.store import Store
from loraq.utils.assets import resolve_asset
from loraq.utils.hashing import check_sha256sums, key

VERSION = 2


def real_images(config: Config) -> ImageSet | FeatureSet:
    """The real images of the prompts (of the set or a folder), or features read from a file."""
    assert config.data.real is not None
    if config.data.real == "set":
        names = [prompt.name for prompt in data_prompts(config.data)]
        found = real_image_paths(config.data.set, prompts_path(config.data), names)
        return ImageSet(tuple(found), tuple(names))
    path = resolve_asset(config.data.real)
    if path.is_dir():
        return ImageSet.of_folder(path, [prompt.name for prompt in data_prompts(config.data)])
    if not path.is_file():
        raise LoraqError(
            f"data.real={config.data.real}: no such folder or features file. Set data.real to an "
            "existing one, or set data.real=null metrics=paired to skip these metrics."
        )
    check_sha256sums(path.parent, (path.name,), "data.real")
    all_prompts = data_prompts(dataclasses.replace(config.data, count=None))
    return load_features(path, [prompt.name for prompt in all_prompts])


def with_features(
    images: ImageSet, extractors: Sequence[ExtractorName], store: Store, row: Row
) -> None:
    """Set the features of an image set of many rows (real or 16-bit), extracted once for all."""
    computed_by = row.device if row.arithmetic is None else row.arithmetic
    options = {"device": row.device, "workers": row.config.metrics.workers}
    for extractor in extractors:
        name = key("features", VERSION, images.hash, extractor_sources(extractor), computed_by)
        score_images(store, ("features", name), images, None, (), (extractor,), options)
