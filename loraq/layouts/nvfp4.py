"""NVFP4 weights as row-major readers hold them: our codes, E4M3 scales, one float32 scale.

Letters: I in, O out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loraq.formats import QuantizedTensor, get_format
from loraq.layers.tensors import LayerTensors
from loraq.layouts.refusals import (
    refuse_convolution,
    refuse_format,
    refuse_rotation,
    refuse_shift,
    refuse_width,
)
from loraq.layouts.targets import Source

BLOCK = 16
WEIGHT = get_format("nvfp4", tensor_scale="tensor")
FIXED = get_format("nvfp4", tensor_scale="fixed")
"""Activations without a tensor scale, which is 1."""


def refuse_nvfp4(source: Source, name: str) -> str | None:
    """Anything but the NVFP4 weight of an `nn.Linear` with plain or smoothed input."""
    layer = source.layers[name]
    fmt = layer.weight.format
    fits = (fmt.name, fmt.block) == ("nvfp4", BLOCK) and fmt.tensor_scale != "token"
    return (
        refuse_rotation(layer)
        or refuse_format(layer, fits, "format@quant.weight=nvfp4")
        or refuse_convolution(source, name)
        or refuse_shift(layer)
        or refuse_width(layer, BLOCK)
    )


def block_scales(weight: QuantizedTensor) -> Tensor:
    """(O, I/16) E4M3."""
    assert weight.scale is not None
    return weight.scale.view(torch.float8_e4m3fn)


def tensor_scale(weight: QuantizedTensor) -> Tensor:
    """[] float32; 1 for the formats that store none."""
    one = torch.ones((), device=weight.codes.device)
    return one if weight.tensor_scale is None else weight.tensor_scale


def nvfp4_weight(codes: Tensor, scales: Tensor, tensor_scale: Tensor) -> QuantizedTensor:
    """The inverse: codes (O, I/2) uint8, E4M3 scales (O, I/16), float32 [] or (O, 1)."""
    if tensor_scale.dim() and bool((tensor_scale == tensor_scale[0]).all()):
        tensor_scale = tensor_scale[0, 0]
    fmt = replace(WEIGHT, tensor_scale="token") if tensor_scale.dim() else WEIGHT
    shape = (codes.shape[0], 2 * codes.shape[1])
    return QuantizedTensor(codes, scales.contiguous().view(torch.uint8), tensor_scale, shape, fmt)


def activations_are_fixed(layer: LayerTensors) -> bool:
    """Whether the layer's own activations are NVFP4 with a tensor scale of 1."""
    return layer.activation == FIXED
