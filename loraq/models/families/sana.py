"""SANA: the linear layers and 1×1 convolutions of its transformer blocks that are quantised.

Layers outside the blocks (patch embedding, timestep and caption projections, output) stay in
16 bits; so do the depthwise convolutions and, by default, the cross-attention keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraq.models.families import MASKED_EMBEDDINGS

if TYPE_CHECKING:
    from torch import nn

    from loraq.models.moments import Moment

PIPELINES = ("SanaPipeline",)
OUTPUT = "image"
TRANSFORMERS = ("SanaTransformer2DModel",)
SIZE_MULTIPLE = 32  # the pipeline refuses other heights and widths
DEFAULT_SKIP = ("cross_k", "cross_v")
TEXT_DEFAULTS = ("complex_human_instruction",)
EMBEDDINGS = MASKED_EMBEDDINGS
SPRINT_GUIDANCE = 4.5  # the pipeline's default; SANA-Sprint embeds it
DTYPES: Mapping[str, str] = {}  # all in one, as in the reference


def known_inputs(transformer: nn.Module) -> Mapping[str, Moment]:
    """Moments of layer inputs that follow from the weights, by input id (`models/moments.py`)."""
    import torch

    # moments imports torch, which the skip list above does not need
    from loraq.models.moments import known_block_inputs, timesteps

    device, dtype = next(transformer.parameters()).device, transformer.dtype
    with torch.no_grad():
        if transformer.config.guidance_embeds:  # SANA-Sprint
            steps = timesteps(last=1).to(device)
            scale = transformer.config.guidance_embeds_scale
            guidance = torch.full_like(steps, SPRINT_GUIDANCE * scale)
            embedded, _ = transformer.time_embed(steps, guidance=guidance, hidden_dtype=dtype)
        else:
            steps = timesteps().to(device)
            embedded, _ = transformer.time_embed(steps, batch_size=len(steps), hidden_dtype=dtype)
        return known_block_inputs(transformer, embedded)
