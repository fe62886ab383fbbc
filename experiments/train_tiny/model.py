"""Networks, scheduler and pipeline of the model to train (`settings.SETTINGS`)."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerFast

from .settings import SETTINGS, Settings


def networks(settings: Settings = SETTINGS) -> Any:
    """Return the module of the model's networks, `pixart`, `sana` or `flux`, with the same
    functions."""
    return importlib.import_module(f"{__package__}.{settings.name.removeprefix('tiny_')}")


def pipeline(
    tokenizer: PreTrainedTokenizerFast,
    text: torch.nn.Module,
    vae: torch.nn.Module,
    net: torch.nn.Module,
    settings: Settings = SETTINGS,
) -> DiffusionPipeline:
    """Return the unmodified pipeline over the four parts."""
    recipe = networks(settings)
    pipe = recipe.PIPELINE(
        **recipe.components(tokenizer, text),
        vae=vae,
        transformer=net,
        scheduler=recipe.scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int = SETTINGS.inference_steps,
    guidance: float = SETTINGS.guidance,
    settings: Settings = SETTINGS,
    pixels: int | None = None,
) -> torch.Tensor:
    """Return images in [-1, 1], [n, 3, pixels, pixels], one seed per prompt."""
    pixels = pixels or settings.image_size
    side = pixels // settings.stride
    shape = (1, settings.latent_channels, side, side)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    recipe = networks(settings)
    latents = recipe.pack(torch.cat(noise)).to(pipe.transformer.device, pipe.transformer.dtype)
    out = pipe(
        prompts,
        height=pixels,
        width=pixels,
        latents=latents,
        num_inference_steps=steps,
        max_sequence_length=settings.text_length,
        output_type="pt",
        **recipe.arguments(guidance, len(prompts)),
    ).images
    return out * 2 - 1
