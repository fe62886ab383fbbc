"""PixArt-Σ: which linears of its transformer blocks are quantised, and what each one does.

Outside the blocks (patch embedding, timestep and caption projections, output) everything stays
in 16 bits; so do the cross-attention keys and values by default, as in SVDQuant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loraq.models.moments import Moment, known_block_inputs, timesteps
from loraq.models.roles import ATTENTION_ROLES

PIPELINE = "PixArtSigmaPipeline"
TRANSFORMER = "PixArtTransformer2DModel"
DEFAULT_SKIP = ("cross_k", "cross_v")
AFTER_GELU = ("ff_down",)

ROLES = (
    *ATTENTION_ROLES,
    (r"transformer_blocks\.\d+\.ff\.net\.0\.proj", "ff_up", "ff.up"),
    (r"transformer_blocks\.\d+\.ff\.net\.2", "ff_down", "ff.down"),
)


@torch.no_grad()
def known_inputs(transformer: nn.Module) -> Mapping[str, Moment]:
    """Moments of layer inputs that follow from the weights, by input id (see `analytic`)."""
    steps = timesteps()
    condition = _size_condition(transformer, len(steps))
    device = next(transformer.parameters()).device
    embedded, _ = transformer.adaln_single(
        steps.to(device), condition, batch_size=len(steps), hidden_dtype=transformer.dtype
    )
    return known_block_inputs(transformer, embedded)


def _size_condition(transformer: nn.Module, count: int) -> dict[str, torch.Tensor | None]:
    """The size embedding's inputs at the model's own square size, where it has that embedding."""
    if not transformer.config.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    side = float(transformer.config.sample_size * 8)
    device = next(transformer.parameters()).device
    return {
        "resolution": torch.full((count, 2), side, device=device),
        "aspect_ratio": torch.ones(count, 1, device=device),
    }
