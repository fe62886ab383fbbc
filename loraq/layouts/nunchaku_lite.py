"""diffusers' `nunchaku_lite` (0.42.1): SVDQuant INT4 and NVFP4 in tiles, by diffusers' own names.

config.json's `quantization_config` lists the quantised modules as `targets`; the tensors are those
of `tiled_layer.py` under each target's name. A file has one rank and one precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.layouts.files import (
    WEIGHTS,
    by_layer,
    quantization_config,
    read_tensors,
    write_config,
    write_layers,
)
from loraq.layouts.modulation import unpack_modulation
from loraq.layouts.targets import Contents, Source, Target
from loraq.layouts.tiled_layer import PRECISIONS, Precision, pack_layer, unpack_layer
from loraq.layouts.tiled_network import refuse_layer, source_precision, tiled_layers, tiled_losses
from loraq.layouts.tiles import TILE

METHOD = "nunchaku_lite"
NAMES = ("int4", "nvfp4")


def refuse(source: Source, name: str) -> str | None:
    """Only linear layers of whole tiles, without shift or rotation, in INT4 or NVFP4."""
    return refuse_layer(source, name, NAMES, pads=False)


def write(source: Source, folder: Path) -> None:
    """The network's tensors in one file, and its configuration with the list of targets."""
    precision, layers = source_precision(source), tiled_layers(source)
    section = {
        "precision": precision.name,
        "group_size": precision.block,
        "rank": next(iter(layers.values())).rank,
        "targets": list(layers),
    }
    dtype = str(source.dtype).removeprefix("torch.")
    tensors = {name: pack_layer(layer) for name, layer in layers.items()}
    write_layers(folder / WEIGHTS, tensors, source.other_tensors())
    write_config(
        folder,
        source.network,
        {"quant_method": METHOD, "compute_dtype": dtype, "svdq_w4a4": section},
    )


def detect(path: Path) -> bool:
    """By config.json's `quant_method`."""
    return quantization_config(path).get("quant_method") == METHOD


def read(path: Path) -> Contents:
    """The layers that are listed; LoraqError if the file holds others, or lists others.

    Layers of `awq_w4a16`, whose weights alone have 4 bits, are read by value.
    """
    config = quantization_config(path)
    precision, rank, targets = _section(path, config.get("svdq_w4a4"))
    plain = (config.get("awq_w4a16") or {}).get("targets", [])
    groups, others = by_layer(read_tensors(path), "qweight")
    if wrong := sorted(set(groups) ^ {*targets, *plain}):
        where = "lists no" if wrong[0] in groups else "holds no tensors of the listed"
        raise LoraqError(f"'{path}' {where} layer '{wrong[0]}'. Restore its config.json and file.")
    layers = {}
    for name, held in groups.items():
        if name in plain:
            others |= unpack_modulation(name, held)
            continue
        layers[name] = layer = unpack_layer(name, held, precision)
        if layer.rank != rank or any(size % TILE for size in layer.weight.shape):
            raise LoraqError(
                f"'{name}' has shape {tuple(layer.weight.shape)} and rank {layer.rank}, and the "
                f"layout multiples of {TILE} and rank {rank}."
            )
    return Contents(layers, others)


def _section(path: Path, section: Any) -> tuple[Precision, int, list[str]]:
    """Precision, rank and targets of `svdq_w4a4`."""
    held = section if isinstance(section, Mapping) else {}
    precision = PRECISIONS.get(held.get("precision", "")) if held else None
    rank, targets = held.get("rank"), held.get("targets")
    if (
        precision is None
        or precision.name not in NAMES
        or held.get("group_size") != precision.block
        or not isinstance(rank, int)
        or not isinstance(targets, list)
    ):
        raise LoraqError(
            f"svdq_w4a4 in '{path / 'config.json'}' is {section}. It needs precision int4 with "
            "group_size 64 or nvfp4 with group_size 16, rank and targets."
        )
    return precision, rank, targets


TARGET = Target(
    name=METHOD,
    description="SVDQuant INT4 or NVFP4 in tiles with a 16-bit branch, by diffusers' own names",
    readers="diffusers 0.42 with the kernels package (DIFFUSERS_TRUST_REMOTE_KERNELS)",
    hardware="INT4: CUDA sm75 to sm89, sm120; NVFP4: from sm100; not Hopper",
    refuse=refuse,
    losses=tiled_losses,
    write=write,
    detect=detect,
    read=read,
)
