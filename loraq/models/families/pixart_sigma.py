"""PixArt-Σ: the linear layers of its transformer blocks that are quantised, and their roles.

Layers outside the blocks (patch embedding, timestep and caption projections, output) stay in
16 bits; by default also the cross-attention keys and values, as in SVDQuant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from loraq.models.families import MASKED_EMBEDDINGS

if TYPE_CHECKING:
    import torch
    from torch import nn

    from loraq.models.moments import Moment

PIPELINES = ("PixArtSigmaPipeline", "PixArtAlphaPipeline")
OUTPUT = "image"
TRANSFORMERS = ("PixArtTransformer2DModel",)
SIZE_MULTIPLE = 8  # the pipeline refuses other heights and widths
DEFAULT_SKIP = ("cross_k", "cross_v")
TEXT_DEFAULTS = ("clean_caption",)
EMBEDDINGS = MASKED_EMBEDDINGS
DTYPES: Mapping[str, str] = {}  # all in one, as in the reference


def known_inputs(transformer: nn.Module) -> Mapping[str, Moment]:
    """Moments of layer inputs that follow from the weights, by input id (`models/moments.py`)."""
    import torch

    # moments imports torch, which the skip list above does not need
    from loraq.models.moments import known_block_inputs, timesteps

    steps = timesteps()
    condition = _size_condition(transformer, len(steps))
    device = next(transformer.parameters()).device
    with torch.no_grad():
        embedded, _ = transformer.adaln_single(
            steps.to(device), condition, batch_size=len(steps), hidden_dtype=transformer.dtype
        )
        return known_block_inputs(transformer, embedded)


def _size_condition(transformer: nn.Module, count: int) -> dict[str, torch.Tensor | None]:
    """The inputs of the size embedding for the model's square sample size; None without one."""
    import torch

    if not transformer.config.use_additional_conditions:
        return {"resolution": None, "aspect_ratio": None}
    side = float(transformer.config.sample_size * 8)
    device = next(transformer.parameters()).device
    return {
        "resolution": torch.full((count, 2), side, device=device),
        "aspect_ratio": torch.ones(count, 1, device=device),
    }
