"""Every number of the recipe that two files share, in one frozen dataclass."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "loraq" / "assets"
# Checkpoints, logs and unpacked data; the variable keeps a trial run apart from a real one.
OUTPUTS = Path(os.environ.get("LORAQ_TRAIN_OUTPUTS", ROOT / "outputs" / "train_tiny"))


@dataclass(frozen=True)
class Settings:
    """Sizes and seeds of the data and of the three networks."""

    seed: int = 0
    image_size: int = 128
    train_subjects: int = 320
    held_test: int = 128
    held_dev: int = 32
    calibration: int = 128
    text_length: int = 16
    vocab_size: int = 2048
    text_width: int = 256
    width: int = 384
    heads: int = 6
    blocks: int = 6
    vae_channels: tuple[int, ...] = (16, 32, 64, 96)
    latent_channels: int = 4
    caption_dropout: float = 0.1
    inference_steps: int = 16
    guidance: float = 3.0


SETTINGS = Settings()
