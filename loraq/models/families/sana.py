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


def known_inputs(transformer: nn.Module) -> Mapping[str, Moment]:
    """Moments of layer inputs that follow from the weights, by input id (`models/moments.py`)."""
    import torch

    # moments imports torch, which the skip list above does not need
    from loraq.models.moments import known_block_inputs, timesteps

    steps = timesteps()
    device = next(transformer.parameters()).device
    with torch.no_grad():
        embedded, _ = transformer.time_embed(
            steps.to(device), batch_size=len(steps), hidden_dtype=transformer.dtype
        )
        return known_block_inputs(transformer, embedded)
