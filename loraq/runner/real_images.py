"""The real images of a run's prompts, and their features, made once, kept by the images' hash."""

from __future__ import annotations

import dataclasses
from typing import Any

from loraq.config import Config
from loraq.data import data_prompts, prompts_path, real_image_paths
from loraq.errors import LoraqError
from loraq.metrics.common.features import (
    EXTRACTORS,
    choose_extractor,
    features_of,
    load_features,
    save_features,
)
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import Options
from loraq.metrics.registry import find_metric
from loraq.runner.store import Store
from loraq.utils.assets import resolve_asset
from loraq.utils.hashing import cached_hash, key

VERSION = 1
FILE = "features.safetensors"


def real_images(config: Config) -> Any:
    """The real images of the prompts: the set's own, those of a folder, or a file of features."""
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
            f"data.real={config.data.real}: there is no such folder or features file. Give "
            "one, or set data.real=null metrics=paired to leave these metrics out."
        )
    whole = data_prompts(dataclasses.replace(config.data, count=None))
    return load_features(path, [prompt.name for prompt in whole])


def with_features(real: Any, config: Config, store: Store, device: str) -> Any:
    """`real` with the features that the metrics read, so that no row extracts them again."""
    if not isinstance(real, ImageSet):
        return real
    if not any(find_metric(name).NEEDS == "real" for name in config.metrics.names):
        return real
    extractor = choose_extractor(config.metrics.extractor, real)
    weights = cached_hash(EXTRACTORS[extractor].weights())
    images = dict(zip(real.names, map(cached_hash, real.paths), strict=True))
    name = key("features", VERSION, images, extractor, weights, device)
    info: dict[str, Any] = {"kind": f"features/{extractor}", "units": len(real)}
    with store.lock("features", name):
        if not store.finished("features", name):
            options = Options(device=device, workers=config.metrics.workers)
            made = features_of(real, extractor, options)
            with store.write("features", name, info) as folder:
                save_features(made, folder / FILE)
        real.features[extractor] = load_features(store.path("features", name) / FILE)
    return real
