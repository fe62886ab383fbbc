"""nunchaku's single file: a network in one safetensors file, with its configuration in the header.

Suffixes are those of nunchaku's Python classes (`smooth_factor`, `proj_down`, `proj_up`) or of its
older C++ ones (`smooth`, `lora_down`, `lora_up`). `…_orig` is a second smoothing, which no reader
uses: it is written like the first and not read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.layouts.files import WEIGHTS, by_layer, own_config, read_tensors, write_layers
from loraq.layouts.tiled_layer import Precision

OLDER = {"smooth_factor": "smooth", "proj_down": "lora_down", "proj_up": "lora_up"}
_SCALE_TYPES: dict[str, tuple[Any, Any]] = {
    "int4": (None, None),
    "nvfp4": ([None, "fp8_e4m3_nan"], "fp8_e4m3_nan"),
    "mxfp4": ("ue8m0", "ue8m0"),
}


def write_single(
    folder: Path,
    network: nn.Module,
    layers: Mapping[str, Mapping[str, Tensor]],
    others: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    """One file of the tensors LAYER.SUFFIX and of all others."""
    config = {"config": json.dumps(own_config(network))}
    write_layers(folder / WEIGHTS, layers, others, {**config, **metadata})


def quantization(precision: Precision, rank: int) -> dict[str, str]:
    """The metadata of this format: element, scales and groups of weights and activations."""
    element = "int4" if precision.name == "int4" else "fp4_e2m1_all"
    weight, activation = (
        {"dtype": element, "scale_dtype": scale, "group_size": precision.block}
        for scale in _SCALE_TYPES[precision.name]
    )
    found = {"method": "svdquant", "rank": rank, "weight": weight, "activation": activation}
    return {"quantization_config": json.dumps(found)}


def has_mx_scales(metadata: Mapping[str, str]) -> bool:
    """Whether the metadata of a file name E8M0 scales, which only `nunchaku_mxfp4` has."""
    return '"ue8m0"' in metadata.get("quantization_config", "")


def older(held: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's tensors by the older names, with the second smoothing."""
    named = {OLDER.get(suffix, suffix): tensor for suffix, tensor in held.items()}
    return named | {"smooth_orig": held["smooth_factor"].clone()}


def read_single(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(layer → suffix → tensor, all other tensors), by the newer names and without `…_orig`."""
    layers, others = by_layer(read_tensors(path), "qweight")
    newer = {old: new for new, old in OLDER.items()}
    found = {}
    for name, held in layers.items():
        named = {newer.get(suffix, suffix): t for suffix, t in held.items()}
        if len(named) < len(held):
            raise LoraqError(f"'{name}' has tensors by older and by newer names: {sorted(held)}.")
        for second in ("smooth_orig", "smooth_factor_orig"):
            named.pop(second, None)
        found[name] = named
    return found, others
