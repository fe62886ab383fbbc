"""ComfyUI's `nvfp4`: codes with the even input in the high nibble, block scales in tiles.

`weight` (O, I/2) uint8; `weight_scale` E4M3 in tiles; `weight_scale_2` [] float32; `input_scale` []
float32, of the activations, without which they get one scale in every call; `pre_quant_scale` (I) =
1/s, which multiplies x. Letters: I in, O out.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from loraq.formats import QuantizedTensor
from loraq.layouts.comfyui_kind import (
    HALVES,
    Held,
    Kind,
    Settings,
    Stored,
    check,
    check_settings,
    matrix,
)
from loraq.layouts.engine_layer import EngineLayer, engine_layer
from loraq.layouts.losses import activation_loss
from loraq.layouts.nvfp4 import (
    FIXED,
    WEIGHT,
    activations_are_fixed,
    block_scales,
    nvfp4_weight,
    refuse_nvfp4,
    tensor_scale,
)
from loraq.layouts.scale_tiles import from_tiles, tiled_shape, to_tiles
from loraq.layouts.targets import Source


def losses(source: Source) -> list[str]:
    """How activations are rounded, and the scale of a whole call, where they are dynamic."""
    found = activation_loss(source, lambda x: FIXED if activations_are_fixed(x) else WEIGHT)
    if count := sum(not activations_are_fixed(layer) for layer in source.layers.values()):
        found.append(
            f"The inputs of {count} layers have one tensor scale for all tokens and images of a "
            "call, so that images of a batch depend on each other. format@quant.activation=nvfp4 "
            "quant.activation.tensor_scale=fixed avoids it."
        )
    return found


def engine(source: Source, name: str) -> EngineLayer:
    """The layer with a static scale of 1 where LoRaQ's activations have it."""
    layer = source.layers[name]
    one = torch.ones((), device=layer.weight.codes.device)
    found = engine_layer(layer, WEIGHT, source.dtype).multiplied()
    return replace(found, input_scale=one if activations_are_fixed(layer) else None)


def tensors(layer: EngineLayer) -> Stored:
    """The stored tensors by suffix."""
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor)
    scales = to_tiles(block_scales(weight).view(torch.uint8)).view(torch.float8_e4m3fn)
    found = {
        "weight": _swapped(weight.codes),
        "weight_scale": scales,
        "weight_scale_2": tensor_scale(weight),
        "input_scale": layer.input_scale,
        "pre_quant_scale": layer.multiply_I,
    }
    return found, {}


def read(name: str, held: Held, settings: Settings) -> EngineLayer:
    """The inverse of `tensors`."""
    check_settings(name, settings)
    out, half = matrix(name, held)
    expected = {
        "weight": ((out, half), torch.uint8),
        "weight_scale": (tiled_shape(out, half // 8), (torch.float8_e4m3fn, torch.uint8)),
        "weight_scale_2": ((), torch.float32),
        "input_scale": ((), torch.float32),
        "pre_quant_scale": ((2 * half,), (*HALVES, torch.float32)),
    }
    dtype = check(name, held, expected, ["input_scale", "pre_quant_scale"])
    scales = from_tiles(held["weight_scale"].view(torch.uint8), out, half // 8)
    return EngineLayer(
        weight=nvfp4_weight(_swapped(held["weight"]), scales, held["weight_scale_2"]),
        activation=WEIGHT,
        dtype=dtype,
        input_scale=held.get("input_scale"),
        multiply_I=held.get("pre_quant_scale"),
        bias_O=held.get("bias"),
    )


def _swapped(codes: Tensor) -> Tensor:
    """The nibbles of each byte in the other order."""
    return codes << 4 | codes >> 4


KIND = Kind(
    name="nvfp4",
    description="NVFP4 without a branch",
    hardware="NVIDIA from sm100; others compute in 16 bits",
    multiple=16,
    refuse=refuse_nvfp4,
    losses=losses,
    engine=engine,
    tensors=tensors,
    read=read,
)
