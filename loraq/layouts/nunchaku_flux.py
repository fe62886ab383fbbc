"""FLUX.1 in nunchaku's single file: the names of its C++ modules, and `proj_out` of two layers.

The last layer of a single block reads attention and feed-forward next to each other. nunchaku has a
layer for each and adds them; in INT4 only the second, behind a GELU, has unsigned inputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor, dequantize
from loraq.layouts.engine_layer import EngineLayer

Held = TypeVar("Held")

CLASSES = ("FluxTransformer2dModel", "FluxTransformer2DModelV2")
AFTER_GELU = ("ff.net.2", "ff_context.net.2", "mlp_fc2")
MODULATION = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}
_BLOCK = re.compile(r"((?:single_)?transformer_blocks\.\d+\.)(\w+)(\..+)?")
_NORMS = {name: f"attn.{name}" for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k")}
_DOUBLE = {
    "qkv_proj": "attn.to_qkv",
    "qkv_proj_context": "attn.to_added_qkv",
    "out_proj": "attn.to_out.0",
    "out_proj_context": "attn.to_add_out",
    "mlp_fc1": "ff.net.0.proj",
    "mlp_fc2": "ff.net.2",
    "mlp_context_fc1": "ff_context.net.0.proj",
    "mlp_context_fc2": "ff_context.net.2",
    **_NORMS,
}
_SINGLE = {"qkv_proj": "attn.to_qkv", "mlp_fc1": "proj_mlp", **_NORMS}


def renamed(held: Mapping[str, Held]) -> dict[str, Held]:
    """The same values by diffusers' names, but for the two parts of `proj_out`."""
    found = {}
    for name, value in held.items():
        if parts := _BLOCK.fullmatch(name):
            block, module, rest = parts.groups("")
            names = _SINGLE if block.startswith("single_") else _DOUBLE
            name = block + names.get(module, module) + rest
        found[name] = value
    return found


def joined_blocks(layers: Mapping[str, EngineLayer]) -> dict[str, EngineLayer]:
    """`out_proj` and `mlp_fc2` of single blocks as one `proj_out`."""
    found = dict(layers)
    for name in layers:
        block, _, module = name.rpartition(".")
        if module in ("out_proj", "mlp_fc2") and block.startswith("single_"):
            pair = [found.pop(f"{block}.{part}", None) for part in ("out_proj", "mlp_fc2")]
            attention, feed_forward = pair
            if attention is not None and feed_forward is not None:
                found[f"{block}.proj_out"] = joined_columns(attention, feed_forward)
            elif f"{block}.proj_out" not in found:
                raise LoraqError(f"'{block}' has only one of out_proj and mlp_fc2. Restore it.")
    return found


def joined_columns(first: EngineLayer, second: EngineLayer) -> EngineLayer:
    """The sum of two layers as one layer of their inputs next to each other.

    Weights whose tensor scales differ are kept by value. A shift is that of the second.
    """
    (out, one), (_, two) = first.weight.shape, second.weight.shape
    held = [layer.weight for layer in (first, second)]
    packed = [weight for weight in held if isinstance(weight, QuantizedTensor)]
    weight: QuantizedTensor | torch.Tensor = torch.cat([dequantize(part) for part in packed], -1)
    if packed[0].tensor_scale is None:
        codes = torch.cat([part.codes for part in packed], -1)
        scale = torch.cat([part.scale for part in packed if part.scale is not None], -1)
        weight = QuantizedTensor(codes, scale, None, (out, one + two), packed[0].format)
    branches = [(x.down_IR, x.up_OR) for x in (first, second)]
    downs = [down for down, _ in branches if down is not None]
    ups = [up for _, up in branches if up is not None]
    biases = [layer.bias_O for layer in (first, second) if layer.bias_O is not None]
    smooth = [layer.smooth_I for layer in (first, second) if layer.smooth_I is not None]
    return replace(
        second,
        weight=weight,
        signed_inputs=one if second.shift else 0,
        smooth_I=torch.cat(smooth),
        down_IR=torch.block_diag(*downs),
        up_OR=torch.cat(ups, -1),
        bias_O=torch.stack(biases).float().sum(0) if biases else None,
    )
