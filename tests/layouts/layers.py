"""Packed layers of random weights, and a network that holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from loraq.formats import get_format, quantize
from loraq.layers.linear import QuantizedLinear
from loraq.layers.tensors import LayerTensors
from loraq.layouts.targets import Source
from loraq.transforms import GELU_SHIFT, InputTransform


def packed_layer(
    out: int = 128,
    width: int = 128,
    rank: int = 16,
    *,
    weight: str = "int4",
    activation: str | None = None,
    branch: str = "fp16",
    branch_block: int | None = None,
    smooth: bool = True,
    shift: bool = False,
    seed: int = 0,
    **options: Any,
) -> LayerTensors:
    """A layer whose weight is W·s − L·R rounded to `weight`; rank 0: without a branch."""
    g = torch.Generator().manual_seed(seed)
    w_OI = torch.randn(out, width, generator=g) * width**-0.5
    bias_O = torch.randn(out, generator=g)
    s_I = torch.rand(width, generator=g).add(0.5).bfloat16().float() if smooth else None
    transform = InputTransform(s_I, shift=GELU_SHIFT if shift else 0.0)
    scaled_OI, fmt = transform.weight(w_OI), get_format(weight, **options)
    own = activation or ("uint4" if shift else weight)
    left = right = None
    if rank:
        u, sigma, v = torch.linalg.svd(scaled_OI, full_matrices=False)
        root = sigma[:rank].sqrt()
        factor = get_format(branch, branch_block)
        left = quantize(u[:, :rank] * root, factor)
        right = quantize(root[:, None] * v[:rank], factor)
        scaled_OI = scaled_OI - u[:, :rank] * sigma[:rank] @ v[:rank]
    return LayerTensors(
        weight=quantize(scaled_OI, fmt),
        activation=get_format(own, tensor_scale="fixed" if own == "nvfp4" else None),
        transform=transform,
        left=left,
        right=right,
        branch_activation=get_format(branch) if rank else None,
        requantize_intermediate=False,
        bias_O=transform.bias(bias_O, w_OI),
    )


def packed_source(
    layers: dict[str, LayerTensors], dtype: torch.dtype = torch.float16, **given: Any
) -> Source:
    """A network of these layers, whose names have no dot, and one that is not packed."""
    network = nn.ModuleDict({name: QuantizedLinear(layer) for name, layer in layers.items()})
    network["plain"] = nn.LayerNorm(8)
    return Source(network, layers, dtype, **given)


def rows(width: int = 128, count: int = 64, after_gelu: bool = False) -> Tensor:
    """Inputs (count, width) that 16 bits hold; of a layer behind a GELU, at least −0.17."""
    x_TI = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    return (nn.functional.gelu(x_TI) if after_gelu else x_TI).half().float()


def difference(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())
