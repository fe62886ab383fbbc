"""Inputs of one forward at the smallest size, to trace which layers a transformer calls."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

TOKENS = 2


def example_inputs(transformer: nn.Module) -> dict[str, Any]:
    """Keyword arguments of `transformer.forward` for one image of 2×2 patches and two text tokens.

    Read from the signature and the configuration of a diffusers transformer; all values are 0 or 1.
    """
    config: Any = transformer.config
    parameter = next(transformer.parameters())
    like = {"device": parameter.device, "dtype": getattr(transformer, "dtype", parameter.dtype)}
    side = 2 * config.patch_size
    found = {
        "hidden_states": torch.ones(1, config.in_channels, side, side, **like),
        "encoder_hidden_states": torch.ones(1, TOKENS, config.caption_channels, **like),
        "timestep": torch.ones(1, device=parameter.device),
        "added_cond_kwargs": {
            "resolution": torch.ones(1, 2, **like),
            "aspect_ratio": torch.ones(1, 1, **like),
        },
    }
    taken = inspect.signature(transformer.forward).parameters
    return {name: value for name, value in found.items() if name in taken}
