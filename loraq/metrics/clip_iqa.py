"""CLIP-IQA (Wang et al. 2023) as in torchmetrics with a CLIP of OpenAI, per image.

    softmax(100 · cos(image, "Good photo."), 100 · cos(image, "Bad photo."))₁

The probability that CLIP calls the image a good photo; the prompt of the image is not read. CLIP is
that of CLIPScore, as in the SVDQuant reference, not the network of the paper (torchmetrics'
default), which needs the package piq. torchmetrics resizes floats here, without rounding to 8 bits
as CLIPScore does, and so does this.
"""

from __future__ import annotations

from typing import Any, Final

from loraq.metrics import clip_score
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import MetricResult, Options, mean

NAME = "clip_iqa"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "images"
PER_IMAGE = True
ON_DEVICE = True
ANCHORS = ("Good photo.", "Bad photo.")


def sources(options: Options) -> dict[str, Any]:
    return clip_score.sources(options)


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch

    model, processor = clip_score.loaded_clip(options)
    values: list[float] = []
    with torch.inference_mode():
        anchors, _ = clip_score.text_features(model, processor, ANCHORS)
        for batch in images.batches(options.batch_size, options.workers):
            image = clip_score.image_features(model, processor, batch.float())
            values += (100 * image @ anchors.T).softmax(-1)[:, 0].double().tolist()
    return MetricResult(NAME, DIRECTION, mean(values), values, details={"anchors": list(ANCHORS)})
