"""The real images of a run's prompts, and their features, cached by the images' hashes."""

from __future__ import annotations

import dataclasses
from typing import Any

from loraq.config import Config
from loraq.data import data_prompts, prompts_path, real_image_paths
from loraq.errors import LoraqError
from loraq.metrics.common.features import (
    FeatureSet,
    choose_extractor,
    extractor_sources,
    features_of,
    load_features,
    save_features,
)
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import Options
from loraq.metrics.registry import needs_real
from loraq.runner.rows import Row
from loraq.runner.store import Store
from loraq.utils.assets import resolve_asset
from loraq.utils.hashing import check_sha256sums, key

VERSION = 1
FILE = "features.safetensors"


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


def with_features(real: ImageSet | FeatureSet, store: Store, row: Row) -> ImageSet | FeatureSet:
    """`real` with the features that the row's metrics read, extracted once for all rows."""
    config, device = row.config, row.device
    if not isinstance(real, ImageSet):
        return real
    if not needs_real(config.metrics.names):
        return real
    extractor = choose_extractor(config.metrics.extractor, real)
    computed_by = device if row.arithmetic is None else row.arithmetic
    name = key("features", VERSION, real.hash, extractor_sources(extractor), computed_by)
    info: dict[str, Any] = {"kind": f"features/{extractor}", "units": len(real)}
    with store.lock("features", name):
        if not store.finished("features", name):
            options = Options(device=device, workers=config.metrics.workers)
            made = features_of(real, extractor, options)
            with store.write("features", name, info, [FILE]) as folder:
                save_features(made, folder / FILE)
        real.features[extractor] = load_features(store.path("features", name) / FILE)
    return real
