"""A little CLIP of random weights, laid out as the hub does, and what torchmetrics wants of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SIDE = 32


def write_clip(folder: Path) -> None:
    """Two layers of width 32, a vocabulary of single letters, patches of 8 pixels."""
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
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "projection_dim": 24}
    ends = {
        "bos_token_id": len(ids) - 2,
        "eos_token_id": len(ids) - 1,
        "pad_token_id": len(ids) - 1,
    }
    text = CLIPTextConfig(vocab_size=len(ids), **ends, **size)
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, **size)
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    with torch.no_grad():
        for parameter in model.parameters():  # far from its small start, so that scores differ
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}
    )
    model.save_pretrained(folder)
    CLIPProcessor(images, CLIPTokenizer(vocab=ids, merges=[])).save_pretrained(folder)
    if not (folder / "preprocessor_config.json").is_file():  # some releases keep both in one file
        images.save_pretrained(folder)


class Restored:
    """What torchmetrics calls: it wants tensors from `get_*_features`, as transformers 4 gave."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, device: Any) -> Restored:
        return self

    def get_image_features(self, pixels: Any) -> Any:
        return self.model.visual_projection(self.model.vision_model(pixels).pooler_output)

    def get_text_features(self, ids: Any, mask: Any) -> Any:
        return self.model.text_projection(self.model.text_model(ids, mask).pooler_output)
