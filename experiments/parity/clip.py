"""A CLIP with random weights in the hub's folder layout, and an adapter for torchmetrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LITTLE: dict[str, Any] = {
    "text": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "vision": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    "heads": (4, 4),
    "side": 32,
    "patch": 8,
    "projection": 24,
}
LARGE: dict[str, Any] = {
    "text": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12},
    "vision": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24},
    "heads": (12, 16),
    "side": 224,
    "patch": 14,
    "projection": 768,
}
"""Sizes of openai/clip-vit-large-patch14."""


def write_clip(folder: Path, size: dict[str, Any] = LITTLE) -> None:
    """Write a CLIP of this size with random weights; its vocabulary is single characters."""
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        CLIPTextConfig,
        CLIPTokenizer,
        CLIPVisionConfig,
    )

    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(vocabulary)}
    out, (heads, vision_heads), side = size["projection"], size["heads"], size["side"]
    ends = {
        "bos_token_id": len(ids) - 2,
        "eos_token_id": len(ids) - 1,
        "pad_token_id": len(ids) - 1,
    }
    more = {"num_attention_heads": heads, "projection_dim": out, **ends}
    text = CLIPTextConfig(vocab_size=len(ids), **more, **size["text"])
    more = {"num_attention_heads": vision_heads, "projection_dim": out, "patch_size": size["patch"]}
    vision = CLIPVisionConfig(image_size=side, **more, **size["vision"])
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=out))
    with torch.no_grad():
        for (
            parameter
        ) in model.parameters():  # larger than the default initialisation, so that scores differ
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    model.save_pretrained(folder)
    CLIPProcessor(images, CLIPTokenizer(vocab=ids, merges=[])).save_pretrained(folder)
    if not (folder / "preprocessor_config.json").is_file():  # some releases store both in one file
        images.save_pretrained(folder)


class Restored:
    """Adapter for torchmetrics, whose calls of `get_*_features` expect tensors (transformers 4)."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> Restored:
        return self

    def get_image_features(self, pixels: Any) -> Any:
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

    def get_text_features(self, ids: Any, mask: Any) -> Any:
        return self.model.text_projection(self.model.text_model(ids, mask).pooler_output)
