"""Inputs of one forward of a transformer, to trace which layers it calls or to count its work."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

TOKENS = 2


def example_inputs(
    transformer: nn.Module, images: int = 1, side: int | None = None, tokens: int = TOKENS
) -> dict[str, Any]:
    """Keyword arguments of `transformer.forward`, by default the smallest: 2×2 patches, two tokens.

    side: of the square latents. Read from the signature and the configuration of a diffusers
    transformer; all values are 1.
    """
    config: Any = transformer.config
    parameter = next(transformer.parameters())
    like = {"device": parameter.device, "dtype": getattr(transformer, "dtype", parameter.dtype)}
    side = side or 2 * config.patch_size
    found = {
        "hidden_states": torch.ones(images, config.in_channels, side, side, **like),
        "encoder_hidden_states": torch.ones(images, tokens, config.caption_channels, **like),
        "timestep": torch.ones(images, device=parameter.device),
        "added_cond_kwargs": {
            "resolution": torch.ones(images, 2, **like),
            "aspect_ratio": torch.ones(images, 1, **like),
        },
    }
    taken = inspect.signature(transformer.forward).parameters
    return {name: value for name, value in found.items() if name in taken}
