"""SDNQ's INT4 with a low-rank branch, for weights alone (sdnq 0.2.8).

`weight` is flat uint8, two values a byte, the even input low, stored as value + 8; `scale` float32
(O, G, 1), or (O, 1) with one group; `svd_up` (O, R), `svd_down` (R, I); convolutions have two axes
more. The reader sums W = codes·scale + svd_up·svd_down, rounds it to 16 bits and multiplies 16-bit
inputs by it. So a shift of the input folds into the bias; smoothing would need codes of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor, get_format
from loraq.layers.tensors import LayerTensors
from loraq.layouts.engine_layer import SCALE_NAMES, EngineLayer, engine_layer
from loraq.layouts.files import (
    WEIGHTS,
    by_layer,
    check_tensors,
    quantization_config,
    read_tensors,
    write_config,
    write_layers,
)
from loraq.layouts.int4 import int4_weight
from loraq.layouts.losses import activation_loss, branch_loss, factor_loss, sixteen_bits
from loraq.layouts.refusals import (
    refuse_format,
    refuse_rotation,
    refuse_smoothing,
    refuse_width,
)
from loraq.layouts.targets import Contents, Source, Target

FLOATS = (*SCALE_NAMES, torch.float32)


def refuse(source: Source, name: str) -> str | None:
    """Anything but INT4 in equal groups, in the coordinates of the 16-bit weight."""
    layer, weight = source.layers[name], source.layers[name].weight
    block = weight.format.block or 2
    fits = weight.format.name == "int4" and block > 0
    return (
        refuse_rotation(layer)
        or refuse_format(layer, fits, "format@quant.weight=int4")
        or refuse_smoothing(layer)
        or refuse_width(layer, math.lcm(2, min(block, weight.shape[1])))
    )


def losses(source: Source) -> list[str]:
    """The activations, which stay in 16 bits, and the branch's type."""
    sixteen = get_format(SCALE_NAMES[source.dtype])
    branch = [*branch_loss(source), *factor_loss(source)]
    return [*branch, *activation_loss(source, lambda _: sixteen), sixteen_bits(source)]


def write(source: Source, folder: Path) -> None:
    """The transformer's tensors, and its configuration with that of SDNQ."""
    layers = {n: _engine_layer(layer, source.dtype) for n, layer in source.layers.items()}
    rank = max(layer.rank for layer in layers.values())
    tensors: dict[str, dict[str, Tensor | None]] = {}
    convolutions = False
    for name, layer in layers.items():
        axes = (1, 1) if source.convolution(name) else ()
        convolutions |= bool(axes)
        tensors[name] = _tensors(layer.of_rank(rank) if rank else layer, axes)
    write_layers(folder / WEIGHTS, tensors, source.other_tensors())
    kept = (nn.Linear, nn.Conv2d) if convolutions else nn.Linear
    modules = source.network.named_modules()
    block = next(iter(source.layers.values())).weight.format.block
    config = {
        **{"quant_method": "sdnq", "weights_dtype": "int4", "group_size": block or -1},
        **{"use_svd": rank > 0, "svd_rank": rank or 32, "use_hadamard": False},
        **{"quant_conv": convolutions, "dequantize_fp32": True, "add_skip_keys": False},
        "modules_to_not_convert": [
            f"{n}.weight" for n, module in modules if isinstance(module, kept)
        ],
    }
    write_config(folder, source.network, config)


def _engine_layer(layer: LayerTensors, dtype: torch.dtype) -> EngineLayer:
    """The layer with its own scales, and with a bias that makes up for a missing shift."""
    bias_O, shift = layer.bias_O, layer.transform.shift
    if shift:
        folded_O = shift * layer.effective_weight().double().sum(-1)
        bias_O = (folded_O if bias_O is None else bias_O + folded_O).float()
    plain = replace(layer, transform=replace(layer.transform, shift=0.0), bias_O=bias_O)
    found = engine_layer(plain, get_format(SCALE_NAMES[dtype]), dtype)
    return replace(found, weight=layer.weight)


def _tensors(layer: EngineLayer, axes: tuple[int, ...]) -> dict[str, Tensor | None]:
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor) and weight.scale is not None
    out, groups = weight.scale.shape
    shape = (out, 1) if groups == 1 else (out, groups, 1)
    return {
        "weight": _recoded(weight.codes).flatten(),
        "scale": weight.scale.float().reshape(*shape, *axes),
        "svd_up": layer.up_OR,
        "svd_down": None if layer.down_IR is None else layer.down_IR.T,
        "bias": layer.bias_O,
    }


def detect(path: Path) -> bool:
    """By `quant_method` in config.json."""
    return quantization_config(path).get("quant_method") == "sdnq"


def read(path: Path) -> Contents:
    """INT4 with one group size; what else SDNQ writes is refused."""
    config = quantization_config(path)
    for setting, wanted in (
        ("weights_dtype", "int4"),
        *((name, False) for name in ("use_hadamard", "use_quantized_matmul", "use_codebook")),
        *((name, None) for name in ("scale_dtype", "modules_dtype_dict", "modules_quant_config")),
    ):
        if (found := config.get(setting) or None) != (wanted or None):
            raise LoraqError(
                f"'{path}' has {setting}={found}. Of SDNQ's files, those with {wanted} are read."
            )
    groups, others = by_layer(read_tensors(path), "scale")
    return Contents({name: _read_layer(name, held) for name, held in groups.items()}, others)


def _read_layer(name: str, held: Mapping[str, Tensor]) -> EngineLayer:
    codes, scale = held.get("weight"), held["scale"]
    if codes is None or codes.dim() != 1 or scale.dim() < 2:
        raise LoraqError(f"'{name}' has no flat weight beside its scale. Restore the file.")
    out, groups = scale.shape[0], 1 if scale.dim() in (2, 4) else scale.shape[1]
    width, up_OR = 2 * codes.numel() // out, held.get("svd_up")
    axes = (1,) * (scale.dim() // 4 * 2)
    rank = 0 if up_OR is None else up_OR.shape[-1]
    expected: dict[str, Any] = {
        "weight": ((out * width // 2,), torch.uint8),
        "scale": ((out, *([groups] if groups > 1 else []), 1, *axes), FLOATS),
        "bias": ((out,), FLOATS),
    }
    if up_OR is not None:
        expected |= {"svd_up": ((out, rank), FLOATS), "svd_down": ((rank, width), FLOATS)}
    check_tensors(name, held, expected, optional=["bias"])
    halves = (
        t.dtype for t in (up_OR, held.get("bias")) if t is not None and t.dtype in SCALE_NAMES
    )
    dtype, down_RI = next(halves, torch.bfloat16), held.get("svd_down")
    return EngineLayer(
        weight=int4_weight(_recoded(codes.view(out, -1)), scale.reshape(out, groups)),
        activation=get_format(SCALE_NAMES[dtype]),
        dtype=dtype,
        down_IR=None if down_RI is None else down_RI.T.contiguous(),
        up_OR=up_OR,
        bias_O=held.get("bias"),
    )


def _recoded(codes: Tensor) -> Tensor:
    """Two's complement to value + 8 and back: the highest bit of each code is inverted."""
    return codes ^ 0x88


TARGET = Target(
    name="sdnq",
    description="INT4 weights with a branch; activations stay in 16 bits",
    readers="SDNQ 0.2.8, through diffusers",
    hardware="any",
    refuse=refuse,
    losses=losses,
    write=write,
    detect=detect,
    read=read,
)
