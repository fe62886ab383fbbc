"""vLLM-Omni's `svdquant`: row-major NVFP4 with a bfloat16 branch on the raw input (0.30.0).

`qweight` (O, I/2) int8 holds our codes; `wscales` (I/16, O) E4M3; `wtscale` (1) and `wcscales` (O),
whose products are the tensor scale of each row; `proj_down` (I, R), `proj_up` (O, R),
`smooth_factor` (I), `bias` (O). All but the first two are bfloat16, activations NVFP4 with a tensor
scale of 1. Every linear layer is quantised but those that `modules_to_not_convert` names a part of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor
from loraq.layers.tensors import RANK_MULTIPLE
from loraq.layouts.engine_layer import BFLOAT16, EngineLayer, engine_layer, of_one_rank
from loraq.layouts.files import (
    WEIGHTS,
    by_layer,
    check_tensors,
    quantization_config,
    read_tensors,
    write_config,
    write_layers,
    write_settings,
)
from loraq.layouts.losses import activation_loss, svdquant_losses
from loraq.layouts.nvfp4 import FIXED, block_scales, nvfp4_weight, refuse_nvfp4, tensor_scale
from loraq.layouts.targets import Contents, Source, Target
from loraq.layouts.tiled_layer import tensor_scales

CONFIG = "quantization_config.json"
MARKER = "proj_down"
KEYS = {"qweight", "wscales", "wtscale", "wcscales", "proj_down", "proj_up", "smooth_factor"}


def refuse(source: Source, name: str) -> str | None:
    """Anything but NVFP4 of linear layers, in bfloat16, that can be told from those in 16 bits."""
    if reason := refuse_nvfp4(source, name):
        return reason
    if source.dtype != torch.bfloat16:
        return f"the readers compute in bfloat16, not {source.dtype}. {BFLOAT16}"
    if part := next((other for other in _unquantized(source) if other in name), None):
        return (
            f"its name contains that of the 16-bit layer '{part}', and the readers tell layers by "
            f"parts of names. Quantise both, or add this layer to quant.skip"
        )
    return None


def losses(source: Source) -> list[str]:
    """The branch's and the scales' 16-bit types, and names."""
    scales = [tensor_scale(layer.weight) for layer in source.layers.values()]
    found = [*svdquant_losses(source), *activation_loss(source, lambda _: FIXED)]
    if rounded := sum(float(scale) != float(scale.bfloat16()) for scale in scales):
        found.append(
            f"The tensor scales of {rounded} weights become products of two numbers in bfloat16 "
            "(relative error up to 2⁻¹²); quant.weight.tensor_scale=fixed avoids it."
        )
    return [*found, "Layers have their names in diffusers; q, k and v are not fused."]


def write(source: Source, folder: Path) -> None:
    """The transformer's tensors, its configuration, and the quantisation's."""
    layers = {n: engine_layer(layer, FIXED, source.dtype) for n, layer in source.layers.items()}
    layers = of_one_rank(layers, RANK_MULTIPLE)
    tensors = {name: _tensors(layer) for name, layer in layers.items()}
    write_layers(folder / WEIGHTS, tensors, source.other_tensors())
    settings = {
        "quant_method": "svdquant",
        **{"rank": next(iter(layers.values())).rank, "precision": "nvfp4", "act_unsigned": False},
        "modules_to_not_convert": _unquantized(source),
    }
    write_settings(folder / CONFIG, settings)
    write_config(folder, source.network, settings)


def _unquantized(source: Source) -> list[str]:
    """The names of the linear layers that stay in 16 bits."""
    modules = source.network.named_modules()
    return [name for name, module in modules if isinstance(module, nn.Linear)]


def _tensors(layer: EngineLayer) -> dict[str, Tensor]:
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor)
    assert layer.down_IR is not None and layer.up_OR is not None
    rows_O, whole = tensor_scales(weight.tensor_scale, len(weight.codes), layer.dtype, layer.device)
    found = {
        "qweight": weight.codes.view(torch.int8),
        "wscales": block_scales(weight).T,
        "wtscale": whole,
        "wcscales": rows_O,
        "proj_down": layer.down_IR,
        "proj_up": layer.up_OR,
        "smooth_factor": layer.divisors_I(),
    }
    return found if layer.bias_O is None else {**found, "bias": layer.bias_O}


def detect(path: Path) -> bool:
    """By `quant_method` in either file of settings."""
    return quantization_config(path).get("quant_method") == "svdquant"


def read(path: Path) -> Contents:
    """Layers with one tensor scale, or with one for each row."""
    groups, others = by_layer(read_tensors(path), MARKER)
    return Contents({name: _read_layer(name, held) for name, held in groups.items()}, others)


def _read_layer(name: str, held: Mapping[str, Tensor]) -> EngineLayer:
    codes, down_IR = held.get("qweight"), held[MARKER]
    if codes is None or codes.dim() != 2 or down_IR.dim() != 2:
        raise LoraqError(f"'{name}' has no matrix qweight beside {MARKER}. Restore the file.")
    (out, half), rank = codes.shape, down_IR.shape[1]
    half_precision: Any = torch.bfloat16
    expected = {
        "qweight": ((out, half), torch.int8),
        "wscales": ((half // 8, out), torch.float8_e4m3fn),
        "wtscale": ((1,), half_precision),
        "wcscales": ((out,), half_precision),
        "proj_down": ((2 * half, rank), half_precision),
        "proj_up": ((out, rank), half_precision),
        "smooth_factor": ((2 * half,), half_precision),
        "bias": ((out,), half_precision),
    }
    check_tensors(name, held, expected, optional=["wtscale", "wcscales", "bias"])
    scale = held.get("wtscale", torch.ones(1)).float().view(())
    if "wcscales" in held:
        scale = scale * held["wcscales"].float()[:, None]
    return EngineLayer(
        weight=nvfp4_weight(codes.view(torch.uint8), held["wscales"].T, scale),
        activation=FIXED,
        dtype=torch.bfloat16,
        smooth_I=held["smooth_factor"],
        down_IR=down_IR,
        up_OR=held["proj_up"],
        intermediate=torch.bfloat16,
        bias_O=held.get("bias"),
    )


TARGET = Target(
    name="vllm-omni",
    description="row-major NVFP4 with a bfloat16 branch, quantisation svdquant",
    readers="vLLM-Omni 0.30",
    hardware="NVIDIA sm103",
    refuse=refuse,
    losses=losses,
    write=write,
    detect=detect,
    read=read,
)
