"""Settings that several files of the training share, one frozen dataclass per model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ASSETS = ROOT / "loraq" / "assets"


@dataclass(frozen=True)
class Settings:
    """Sizes and seeds of the data and of the three networks."""

    name: str = "tiny_pixart"
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
    single_blocks: int = 0  # FLUX only
    pooled_width: int = 0  # FLUX only: CLIP's width
    stride: int = 8
    vae_channels: tuple[int, ...] = (16, 32, 64, 96)
    latent_channels: int = 4
    vae_steps: int = 3000
    vae_rate: float = 1e-3
    caption_dropout: float = 0.1
    inference_steps: int = 16
    guidance: float = 3.0

    @property
    def sides(self) -> tuple[int, int]:
        """Latent sides of the two phases: pictures of half and of full size."""
        side = self.image_size // self.stride
        return side // 2, side


MODELS = {
    "tiny_pixart": Settings(),
    "tiny_sana": Settings(
        name="tiny_sana",
        stride=16,
        vae_channels=(16, 32, 64, 64, 128),
        latent_channels=16,
    ),
    # FLUX.1 has 19 double- and 38 single-stream blocks; a double-stream block costs 36 width²,
    # a single-stream one 15, modulation included.
    "tiny_flux": Settings(
        name="tiny_flux",
        blocks=1,
        single_blocks=4,
        text_width=192,
        pooled_width=128,
        latent_channels=16,
    ),
}
# The model to train, from an environment variable, so that all stages and workers agree.
SETTINGS = MODELS[os.environ.get("LORAQ_TRAIN_MODEL", "tiny_pixart")]
# Unpacked data (shared by the models), checkpoints and logs; a trial run sets the variable.
TRAINING = Path(os.environ.get("LORAQ_TRAIN_OUTPUTS", ROOT / "outputs" / "train_tiny"))
DATA = TRAINING / "data"
OUTPUTS = TRAINING if SETTINGS.name == "tiny_pixart" else TRAINING / SETTINGS.name
# A user's own pictures, and where all results go then (`run.py --data FOLDER --out FOLDER`).
OWN = Path(os.environ["LORAQ_TRAIN_DATA"]) if "LORAQ_TRAIN_DATA" in os.environ else None
RESULT = Path(os.environ.get("LORAQ_TRAIN_RESULT", ASSETS))
CAPTIONS = RESULT / "captions.json"
# What the model cards are made from: scores, weights table, training. Committed for the assets.
RECORD = Path(os.environ.get("LORAQ_TRAIN_RECORD", Path(__file__).with_name("record")))
