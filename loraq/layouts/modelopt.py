"""ModelOpt's NVFP4 and NVFP4_SVD, as its Hugging Face export writes them (nvidia-modelopt 0.47).

`weight` (O, I/2) uint8 holds our codes, `weight_scale` (O, I/16) E4M3 our scales,
`weight_scale_2` [] float32 the tensor scale. `input_scale` [] float32 is that of the activations,
which are rounded to NVFP4 with it: a static scale. With smoothing, `pre_quant_scale` (I) = 1/s
multiplies x. The branch reads the product, so `svdquant_lora_a` (R, I) and `svdquant_lora_b` (O, R)
are our R and L in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor
from loraq.formats.table import E2M1, E4M3
from loraq.layouts.engine_layer import SCALE_NAMES, EngineLayer, engine_layer, of_one_rank
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
from loraq.layouts.losses import branch_loss, short, sixteen_bits
from loraq.layouts.nvfp4 import (
    BLOCK,
    WEIGHT,
    activations_are_fixed,
    block_scales,
    nvfp4_weight,
    refuse_nvfp4,
    tensor_scale,
)
from loraq.layouts.targets import Contents, Source, Target

RANK_STEP = 32
"""TensorRT-LLM pads to it."""
HEADROOM = 2.0
"""Of a static scale over the largest captured value; block scales have 15 binades to spare."""
MARKER = "weight_scale_2"
HF_CONFIG = "hf_quant_config.json"


def losses(source: Source) -> list[str]:
    """The branch's type and the static scales."""
    dynamic = [not activations_are_fixed(layer) for layer in source.layers.values()]
    found = [
        *branch_loss(source),
        f"1 / s and the branch, where there are any, are rounded to {short(source.dtype)}.",
        sixteen_bits(source),
    ]
    if count := sum(dynamic):
        origin = (
            f"{HEADROOM:g} times the largest captured value"
            if source.captured
            else "1, because no inputs were captured: export a pipeline with prompts"
        )
        found.append(
            f"The inputs of {count} layers are rounded to nvfp4 with a static scale, from {origin}."
        )
    scales = {float(tensor_scale(layer.weight)) for layer in source.layers.values()}
    if len(scales) > 1:
        found.append(
            "Tensor scales differ between layers; a reader that fuses q, k and v needs equal ones. "
            "quant.weight.tensor_scale=fixed makes all of them 1."
        )
    return found


def write(source: Source, folder: Path) -> None:
    """The transformer's tensors, and both configurations that ModelOpt writes."""
    layers = {name: _engine_layer(source, name) for name in source.layers}
    plain = not any(layer.rank or layer.multiply_I is not None for layer in layers.values())
    if not plain:
        complete = {name: _complete(layer) for name, layer in layers.items()}
        layers = of_one_rank(complete, RANK_STEP)
    rank = next(iter(layers.values())).rank
    tensors = {name: _tensors(layer) for name, layer in layers.items()}
    write_layers(folder / WEIGHTS, tensors, source.other_tensors())
    details: dict[str, Any] = {"quant_algo": "NVFP4" if plain else "NVFP4_SVD", "group_size": BLOCK}
    smoothed = {} if plain else {"has_zero_point": False, "pre_quant_scale": True}
    ranked = {} if plain else {"lora_rank": rank}
    modules = source.network.named_modules()
    ignored = sorted(name for name, module in modules if isinstance(module, nn.Linear))
    number = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": BLOCK}
    group = {"input_activations": number, "weights": number, **smoothed, "targets": ["Linear"]}
    producer = {"name": "modelopt", "version": "0.47.0"}
    written = {**details, **smoothed, **ranked, "exclude_modules": ignored}
    write_settings(folder / HF_CONFIG, {"producer": producer, "quantization": written})
    config = {
        "config_groups": {"group_0": {**group, **ranked}},
        "ignore": ignored,
        "quant_algo": details["quant_algo"],
        "producer": producer,
        "quant_method": "modelopt",
    }
    write_config(folder, source.network, config)


def _engine_layer(source: Source, name: str) -> EngineLayer:
    layer = source.layers[name]
    found = engine_layer(layer, WEIGHT, source.dtype, branch_input="smoothed")
    scale = torch.ones((), device=layer.weight.codes.device)
    if source.captured and not activations_are_fixed(layer):
        largest = layer.transform.input(source.inputs[name].to(scale.device)).abs().amax()
        scale = (HEADROOM * largest / (E2M1.maximum * E4M3.maximum)).float()
        scale = torch.where(scale > 0, scale, 1.0)
    return replace(found.multiplied(), input_scale=scale)


def _complete(layer: EngineLayer) -> EngineLayer:
    """The same layer with factors of its inputs: every layer of an NVFP4_SVD file has them."""
    if layer.multiply_I is not None:
        return layer
    ones_I = torch.ones(layer.weight.shape[1], dtype=layer.dtype, device=layer.device)
    return replace(layer, multiply_I=ones_I)


def _tensors(layer: EngineLayer) -> dict[str, Tensor | None]:
    weight = layer.weight
    assert isinstance(weight, QuantizedTensor)
    return {
        "weight": weight.codes,
        "weight_scale": block_scales(weight),
        "weight_scale_2": tensor_scale(weight),
        "input_scale": layer.input_scale,
        "pre_quant_scale": layer.multiply_I,
        "svdquant_lora_a": None if layer.down_IR is None else layer.down_IR.T,
        "svdquant_lora_b": layer.up_OR,
        "bias": layer.bias_O,
    }


def detect(path: Path) -> bool:
    """By `quant_method` and the algorithm in config.json."""
    return quantization_config(path).get("quant_method") == "modelopt"


def read(path: Path) -> Contents:
    """NVFP4 and NVFP4_SVD; other algorithms are refused."""
    algorithm = quantization_config(path).get("quant_algo")
    if algorithm not in ("NVFP4", "NVFP4_SVD"):
        raise LoraqError(
            f"'{path}' has quant_algo={algorithm}. Of ModelOpt's files, those with NVFP4 and "
            "NVFP4_SVD are read."
        )
    groups, others = by_layer(read_tensors(path), MARKER)
    svd = algorithm == "NVFP4_SVD"
    return Contents({name: _read_layer(name, held, svd) for name, held in groups.items()}, others)


def _read_layer(name: str, held: Mapping[str, Tensor], svd: bool) -> EngineLayer:
    codes, factor = held.get("weight"), held.get("svdquant_lora_b" if svd else "bias")
    if codes is None or codes.dim() != 2:
        raise LoraqError(f"'{name}' has no matrix weight beside {MARKER}. Restore the file.")
    (out, half), rank = codes.shape, 0 if factor is None else factor.shape[-1]
    halves = tuple(SCALE_NAMES)
    expected: dict[str, Any] = {
        "weight": ((out, half), torch.uint8),
        "weight_scale": ((out, half // 8), torch.float8_e4m3fn),
        "weight_scale_2": ((), torch.float32),
        "input_scale": ((), torch.float32),
        "bias": ((out,), halves),
    }
    if svd:
        expected |= {
            "pre_quant_scale": ((2 * half,), halves),
            "svdquant_lora_a": ((rank, 2 * half), halves),
            "svdquant_lora_b": ((out, rank), halves),
        }
    check_tensors(name, held, expected, optional=["bias"])
    down_RI = held.get("svdquant_lora_a")
    return EngineLayer(
        weight=nvfp4_weight(codes, held["weight_scale"], held["weight_scale_2"]),
        activation=WEIGHT,
        dtype=torch.bfloat16 if factor is None else factor.dtype,
        input_scale=held["input_scale"],
        multiply_I=held.get("pre_quant_scale"),
        down_IR=None if down_RI is None else down_RI.T.contiguous(),
        up_OR=held.get("svdquant_lora_b"),
        branch_input="smoothed",
        bias_O=held.get("bias"),
    )


TARGET = Target(
    name="modelopt",
    description="row-major NVFP4, with a branch and smoothing NVFP4_SVD",
    readers="TensorRT-LLM, and diffusers without branch and smoothing",
    hardware="NVIDIA from sm100",
    refuse=refuse_nvfp4,
    losses=losses,
    write=write,
    detect=detect,
    read=read,
)
