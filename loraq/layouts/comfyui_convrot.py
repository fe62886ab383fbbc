"""ComfyUI's `convrot_w4a4`: INT4 channels of a weight that a regular Hadamard matrix has rotated.

`weight` (O, I/2) int8 holds two's complement, the even input in the low nibble; `weight_scale` (O)
float32. Inputs are rotated in blocks of `convrot_groupsize` inputs, then rounded to INT4 or, with
`linear_dtype` int8, to INT8 with one scale per token.

With the signs (1, 1, 1, −1) ⊗ … our rotation is theirs up to the order and sign of the channels in
a block, which changes no scale: the codes are only reordered and negated. Letters: I in, O out.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, get_format
from loraq.formats.packing import pack, unpack
from loraq.layers.tensors import LayerTensors
from loraq.layouts.comfyui_kind import Held, Kind, Settings, Stored, check, check_settings, matrix
from loraq.layouts.engine_layer import EngineLayer, engine_layer
from loraq.layouts.int4 import int4_weight
from loraq.layouts.losses import activation_loss
from loraq.layouts.refusals import refuse_format, refuse_shift, refuse_smoothing
from loraq.layouts.targets import Source
from loraq.transforms import InputTransform
from loraq.transforms.hadamard import is_power_of_four, regular_order

GROUP = "convrot_groupsize"


def refuse(source: Source, name: str) -> str | None:
    """Anything but INT4 channels of a weight behind the regular rotation."""
    layer = source.layers[name]
    fmt, transform = layer.weight.format, layer.transform
    fits, channel = (fmt.name, fmt.block) == ("int4", None), "quant.weight.block=channel"
    if reason := (
        refuse_format(layer, fits, f"format@quant.weight=int4 {channel}")
        or refuse_smoothing(layer)
        or refuse_shift(layer)
    ):
        return reason
    if transform.signs_I is None or regular_order(transform.signs_I, transform.block) is None:
        return (
            "its input is not multiplied by a regular Hadamard matrix, as ComfyUI does. Set "
            "quant.transform.hadamard=256 quant.transform.signs=regular"
        )
    return None


def losses(source: Source) -> list[str]:
    """The rounding of activations."""
    return activation_loss(source, _activation)


def _activation(layer: LayerTensors) -> Format:
    return get_format("int8" if layer.activation.name == "int8" else "int4", "token")


def engine(source: Source, name: str) -> EngineLayer:
    """The layer in the order and with the signs of the regular rotation."""
    layer = source.layers[name]
    weight, transform = layer.weight, layer.transform
    assert transform.signs_I is not None
    order = regular_order(transform.signs_I, transform.block)
    assert order is not None
    places_I, flips_I = order
    codes = unpack(weight.codes, weight.format.bits, weight.shape[1])[:, places_I]
    codes = torch.where(flips_I, (16 - codes) % 16, codes)  # two's complement
    unrotated = replace(
        layer, transform=InputTransform(), weight=replace(weight, codes=pack(codes, 4))
    )
    found = engine_layer(unrotated, _activation(layer), source.dtype)
    return replace(found, weight=unrotated.weight, rotation=transform.block)


def tensors(layer: EngineLayer) -> Stored:
    """The stored tensors by suffix."""
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor) and weight.scale is not None
    found = {
        "weight": weight.codes.view(torch.int8),
        "weight_scale": weight.scale.float().flatten(),
    }
    return found, {GROUP: layer.rotation, "linear_dtype": layer.activation.name}


def read(name: str, held: Held, settings: Settings) -> EngineLayer:
    """The inverse of `tensors`."""
    check_settings(name, settings, (GROUP, "linear_dtype"))
    out, half = matrix(name, held)
    expected = {"weight": ((out, half), torch.int8), "weight_scale": ((out,), torch.float32)}
    dtype, rotation = check(name, held, expected), settings.get(GROUP, 256)
    activation = settings.get("linear_dtype", "int4")
    fits = isinstance(rotation, int) and is_power_of_four(rotation) and not 2 * half % rotation
    if activation not in ("int4", "int8") or not fits:
        raise LoraqError(
            f"'{name}' has {activation}, {GROUP}={rotation} and {2 * half} inputs: linear_dtype "
            "int4 or int8, and a power of 4 that divides the inputs are read."
        )
    return EngineLayer(
        weight=int4_weight(held["weight"].view(torch.uint8), held["weight_scale"][:, None]),
        activation=get_format(activation, "token"),
        dtype=dtype,
        rotation=rotation,
        bias_O=held.get("bias"),
    )


KIND = Kind(
    name="convrot_w4a4",
    description="INT4 channels behind a regular Hadamard rotation, without a branch",
    hardware="NVIDIA from sm75; others compute in 16 bits",
    multiple=64,
    refuse=refuse,
    losses=losses,
    engine=engine,
    tensors=tensors,
    read=read,
)
