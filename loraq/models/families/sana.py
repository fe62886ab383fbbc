"""SANA: which linears and 1×1 convolutions of its transformer blocks are quantised.

Outside the blocks (patch embedding, timestep and caption projections, output) everything stays in
16 bits; so do the depthwise convolutions and, by default, the cross-attention keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loraq.models.moments import Moment, known_block_inputs, timesteps
from loraq.models.roles import ATTENTION_ROLES

PIPELINE = "SanaPipeline"
TRANSFORMER = "SanaTransformer2DModel"
DEFAULT_SKIP = ("cross_k", "cross_v")
AFTER_GELU = ()  # conv_point reads a gated SiLU, which nothing bounds below

ROLES = (
    *ATTENTION_ROLES,
    (r"transformer_blocks\.\d+\.ff\.conv_inverted", "ff_up", "ff.up"),
    (r"transformer_blocks\.\d+\.ff\.conv_point", "ff_down", "ff.down"),
)


@torch.no_grad()
def known_inputs(transformer: nn.Module) -> Mapping[str, Moment]:
    """Moments of layer inputs that follow from the weights, by input id (see `analytic`)."""
    steps = timesteps()
    device = next(transformer.parameters()).device
    embedded, _ = transformer.time_embed(
        steps.to(device), batch_size=len(steps), hidden_dtype=transformer.dtype
    )
    return known_block_inputs(transformer, embedded)
