"""CLIPScore (Hessel et al. 2021) as in torchmetrics: 100 · cos(image, prompt), per image.

CLIP on transformers' classes, with the weights of openai/clip-vit-large-patch14 as in published
tables (`loraq fetch weights`); the environment variable LORAQ_CLIP may name the folder of another
CLIP. torchmetrics truncates a prompt of more than 77 tokens without its end token, whose state is
the text feature; the feature of such a prompt is that of its start token. This metric does the
same, for comparability; `details.cut` counts these prompts.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.published import CLIP
from loraq.metrics.common.result import MetricResult, Options, mean, versions
from loraq.models.contents import check_network
from loraq.utils.hashing import cached_hash, text_hash

NAME = "clip_score"
VERSION = "1"
DIRECTION: Final = "higher"
NEEDS: Final = "prompts"
PER_IMAGE = True
ON_DEVICE = True
COUNTED = ("cut",)
VARIABLE = CLIP.variable
WEIGHTS = "model.safetensors"
FILES = ("config.json", "preprocessor_config.json", "tokenizer_config.json")
SETTINGS = (".json", ".txt")  # suffixes of what else is read: configurations and vocabularies


def sources(options: Options) -> dict[str, Any]:
    if CLIP.named():
        folder = _folder()
        check_network(folder, "transformers", "CLIPModel")
        read = [path for path in folder.iterdir() if path.suffix in SETTINGS]
        hashes = {path.name: cached_hash(path) for path in (*read, folder / WEIGHTS)}
    else:
        hashes = CLIP.hashes(f"metric {NAME}")
    settings = sorted(name for name in hashes if name != WEIGHTS)
    return {
        "packages": versions("transformers", "torch", "torchvision"),
        "weights_sha256": hashes[WEIGHTS],
        "settings_sha256": text_hash("".join(f"{name} {hashes[name]}\n" for name in settings)),
    }


def compute(images: ImageSet, options: Options) -> MetricResult:
    import torch

    model, processor = loaded_clip(options)
    assert images.prompts is not None
    values: list[float] = []
    cut = 0
    with torch.inference_mode():
        for batch in images.batches(options.batch_size, options.workers):
            image = image_features(model, processor, batch)
            prompts = images.prompts[len(values) : len(values) + len(batch)]
            text, truncated = text_features(model, processor, prompts)
            cut += truncated
            values += (100 * (image * text).sum(-1)).double().tolist()
    details = {
        "model": str(model.config.name_or_path).rsplit("/", 1)[-1],
        "cut": cut,
    }
    return MetricResult(NAME, DIRECTION, mean(values), values, details=details)


def loaded_clip(options: Options) -> tuple[Any, Any]:
    """The chosen CLIP and its processor."""
    return load_clip(_folder(), options.device, str(sources(options)))


def image_features(model: Any, processor: Any, batch: Any) -> Any:
    """Unit vectors [n, d] of images [n, 3, h, w] in 0…255; floats are not rounded when resized."""
    pixels = processor(images=list(batch), return_tensors="pt")["pixel_values"]
    pooled = model.vision_model(pixels.to(model.device)).pooler_output
    return _unit(model.visual_projection(pooled))


def text_features(model: Any, processor: Any, prompts: Sequence[str]) -> tuple[Any, int]:
    """Unit vectors [n, d], and the number of truncated prompts; computed without padding."""
    import torch

    limit, cut, features = model.config.text_config.max_position_embeddings, 0, []
    for prompt in prompts:
        ids = processor(text=[prompt], return_tensors="pt")["input_ids"]
        cut += ids.shape[-1] > limit
        pooled = model.text_model(ids[:, :limit].to(model.device)).pooler_output
        features.append(model.text_projection(pooled))
    return _unit(torch.cat(features)), cut


def _unit(features: Any) -> Any:
    return features / features.norm(dim=-1, keepdim=True)


@functools.lru_cache(maxsize=1)
def load_clip(folder: Path, device: str, contents: str = "") -> tuple[Any, Any]:
    """CLIP and its processor from a local folder.

    contents: identifies the contents of its files; with others they are loaded again.
    """
    from transformers import CLIPModel, CLIPProcessor

    check_network(folder, "transformers", "CLIPModel")
    given: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = CLIPModel.from_pretrained(folder, use_safetensors=True, **given)
        processor = CLIPProcessor.from_pretrained(folder, **given)
    except Exception as error:
        raise LoraqError(
            f"metric clip_score: '{folder}' does not load ({type(error).__name__}: "
            f"{str(error).strip()[:160]}). Restore it, or leave clip_score out of metrics.names."
        ) from error
    return model.float().to(device).eval().requires_grad_(False), processor


def _folder() -> Path:
    """The verified folder of the cache, or the one that LORAQ_CLIP names (no pickles)."""
    what = f"metric {NAME}"
    return CLIP.named_folder(what, (*FILES, WEIGHTS)) if CLIP.named() else CLIP.locate(what)
