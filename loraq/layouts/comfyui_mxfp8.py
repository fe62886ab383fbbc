"""ComfyUI's `mxfp8`: `weight` (O, I) E4M3, `weight_scale` E8M0 bytes of 32 inputs in tiles.

Activations are MXFP8 too; their scales are the smallest powers of two that saturate nothing.
Letters: I in, O out.
"""

from __future__ import annotations

import torch

from loraq.formats import QuantizedTensor, get_format
from loraq.layouts.comfyui_kind import Held, Kind, Settings, Stored, check, check_settings, matrix
from loraq.layouts.engine_layer import EngineLayer, engine_layer
from loraq.layouts.losses import activation_loss
from loraq.layouts.refusals import (
    refuse_format,
    refuse_rotation,
    refuse_shift,
    refuse_smoothing,
)
from loraq.layouts.scale_tiles import from_tiles, tiled_shape, to_tiles
from loraq.layouts.targets import Source

WEIGHT = get_format("mxfp8_e4m3")
ACTIVATION = get_format("mxfp8_e4m3", exponent="rceil")


def refuse(source: Source, name: str) -> str | None:
    """Anything but MXFP8 of the plain input."""
    layer = source.layers[name]
    fmt = layer.weight.format
    fits = (fmt.name, fmt.block) == (WEIGHT.name, WEIGHT.block)
    return (
        refuse_rotation(layer)
        or refuse_format(layer, fits, "format@quant.weight=mxfp8_e4m3")
        or refuse_smoothing(layer)
        or refuse_shift(layer)
    )


def losses(source: Source) -> list[str]:
    """The rounding of activations."""
    return activation_loss(source, lambda _: ACTIVATION)


def engine(source: Source, name: str) -> EngineLayer:
    """The layer with the reader's activations."""
    return engine_layer(source.layers[name], ACTIVATION, source.dtype)


def tensors(layer: EngineLayer) -> Stored:
    """The stored tensors by suffix."""
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor) and weight.scale is not None
    codes = weight.codes.view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale": to_tiles(weight.scale)}, {}


def read(name: str, held: Held, settings: Settings) -> EngineLayer:
    """The inverse of `tensors`."""
    check_settings(name, settings)
    out, width = matrix(name, held)
    expected = {
        "weight": ((out, width), torch.float8_e4m3fn),
        "weight_scale": (tiled_shape(out, width // 32), (torch.float8_e8m0fnu, torch.uint8)),
    }
    dtype = check(name, held, expected)
    scales = from_tiles(held["weight_scale"].view(torch.uint8), out, width // 32)
    codes = held["weight"].view(torch.uint8)
    weight = QuantizedTensor(codes, scales, None, (out, width), WEIGHT)
    return EngineLayer(weight, ACTIVATION, dtype, bias_O=held.get("bias"))


KIND = Kind(
    name="mxfp8",
    description="MXFP8 without a branch",
    hardware="NVIDIA from sm100; others compute in 16 bits",
    multiple=32,
    refuse=refuse,
    losses=losses,
    engine=engine,
    tensors=tensors,
    read=read,
)
