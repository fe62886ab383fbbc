"""The autoencoders start so that hues pass through their latents, noise included."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from experiments.train_tiny import pixart
from experiments.train_tiny.settings import MODELS


def discs(count: int = 24) -> torch.Tensor:
    """Discs of random colours on white, [count, 3, 64, 64] in [-1, 1]."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inside = ((y - 32) ** 2 + (x - 32) ** 2 < 24**2).float()
    colours = torch.rand(count, 3, 1, 1, generator=generator) * 2 - 1
    return inside * colours + (1 - inside)


@torch.no_grad()
def share_of_hues(vae: AutoencoderKL) -> torch.Tensor:
    """Share of the variance of local R - G and B - G that a linear map of the latents explains."""
    images = discs()
    found = vae.encode(images).latent_dist
    noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(1))
    latents = (found.mean + found.std * noise).permute(0, 2, 3, 1).flatten(0, 2)
    local = F.avg_pool2d(images, 8)
    hues = torch.stack([local[:, 0] - local[:, 1], local[:, 2] - local[:, 1]], -1).flatten(0, 2)
    inputs = torch.cat([latents, torch.ones(len(latents), 1)], 1)
    error = hues - inputs @ torch.linalg.lstsq(inputs, hues).solution
    return 1 - error.square().mean(0) / hues.var(0)


@pytest.mark.parametrize(("name", "least"), [("tiny_pixart", 0.08), ("tiny_flux", 0.5)])
def test_hues_pass_an_untrained_autoencoder(name, least):
    """PyTorch's own initial weights and a latent of variance 1 let hardly 1 % of them through."""
    vae = pixart.autoencoder(MODELS[name])
    assert share_of_hues(vae).min() > least
    torch.manual_seed(MODELS[name].seed)
    assert share_of_hues(AutoencoderKL.from_config(vae.config)).max() < 0.03
