"""Normalised latents of the training pictures at both resolutions.

Mean and standard deviation are per channel, over the training subjects at full resolution. The
transformer trains on latents of unit variance (and zero mean for PixArt); export.py folds the
normalisation into the autoencoder.
"""

from __future__ import annotations

import json

import numpy as np
import torch
import torch.nn.functional as F

from loraq.utils.files import write_text

from . import model, runtime, split, vae
from .data import pictures
from .settings import DATA, OUTPUTS, SETTINGS

STATISTICS = OUTPUTS / "latents.json"
CACHE = OUTPUTS / "latents.pt"


@torch.no_grad()
def encode() -> dict[str, torch.Tensor]:
    """Return normalised latents ``{side: [n, channels, side, side]}`` of both phases, in training
    order."""
    if CACHE.exists():
        return torch.load(CACHE, weights_only=True)
    chosen, by_name = split.load()
    images = pictures([by_name[n].fluent for n in chosen.train], DATA / "train128.npy")
    saved = runtime.load_checkpoint(vae.CHECKPOINT, torch.device("cpu"))
    if saved is None:
        raise FileNotFoundError(f"{vae.CHECKPOINT}: train the autoencoder first")
    networks = model.networks()
    autoencoder = networks.autoencoder(SETTINGS)
    autoencoder.load_state_dict(saved["average"])
    autoencoder.eval()
    x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float()
    half, full = map(str, SETTINGS.sides)
    parts: dict[str, list[torch.Tensor]] = {half: [], full: []}
    for chunk in x.split(32):
        small = F.interpolate(chunk, scale_factor=0.5, mode="area")
        for key, pixels in ((full, chunk), (half, small)):
            parts[key].append(networks.encode(autoencoder, pixels / 127.5 - 1))
    latents = {k: torch.cat(v) for k, v in parts.items()}
    mean = (
        latents[full].mean((0, 2, 3)) if networks.CENTRED else torch.zeros(SETTINGS.latent_channels)
    )
    std = latents[full].std((0, 2, 3))
    write_text(STATISTICS, json.dumps({"mean": mean.tolist(), "std": std.tolist()}))
    shape = (1, -1, 1, 1)
    latents = {k: (v - mean.view(shape)) / std.view(shape) for k, v in latents.items()}
    runtime.save_atomic(latents, CACHE)
    return latents
