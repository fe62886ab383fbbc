"""SVDQuant MXFP4 in nunchaku's tiles, as auto-round 0.16.1 writes it for Intel's nunchaku.

A single file with the older names. Its only runtime is a fork of nunchaku that is not public: how
that rounds activations is taken from auto-round (rceil exponents), and was not compared.
"""

from __future__ import annotations

from pathlib import Path

import torch

from loraq.errors import LoraqError
from loraq.layouts.files import read_metadata
from loraq.layouts.single_file import has_mx_scales, older, quantization, read_single, write_single
from loraq.layouts.targets import Contents, Source, Target
from loraq.layouts.tiled_layer import PRECISIONS, pack_layer, unpack_layer
from loraq.layouts.tiled_network import refuse_layer, tiled_layers, tiled_losses
from loraq.layouts.tiles import TILE

MXFP4 = PRECISIONS["mxfp4"]


def refuse(source: Source, name: str) -> str | None:
    """Only linear layers in MXFP4, without shift or rotation; widths are padded."""
    return refuse_layer(source, name, [MXFP4.name])


def losses(source: Source) -> list[str]:
    """Those of the tiles, and the padding."""
    shapes = [layer.weight.shape for layer in source.layers.values()]
    count = sum(any(size % TILE for size in shape) for shape in shapes)
    padding = f"{count} layers are padded with zeros to multiples of {TILE}."
    return [
        *tiled_losses(source),
        *([padding] if count else []),
        "No public program runs these files: auto-round 0.16.1 decodes their weights, and how the "
        "engine rounds activations is not verified.",
    ]


def write(source: Source, folder: Path) -> None:
    """One file; a layer without a bias gets zeros."""
    layers, tensors = tiled_layers(source), {}
    for name, layer in layers.items():
        held = older(pack_layer(layer))
        out = held["qweight"].shape[0]
        held.setdefault("bias", torch.zeros(out, dtype=layer.dtype, device=held["qweight"].device))
        tensors[name] = held
    rank = next(iter(layers.values())).rank
    write_single(folder, source.network, tensors, source.other_tensors(), quantization(MXFP4, rank))


def detect(path: Path) -> bool:
    """By the scales' type in the metadata."""
    return has_mx_scales(read_metadata(path))


def read(path: Path) -> Contents:
    """All layers, of the padded sizes."""
    groups, others = read_single(path)
    if not groups:
        raise LoraqError(f"'{path}' has no quantised layer (LAYER.qweight). Restore the file.")
    return Contents({n: unpack_layer(n, held, MXFP4, ()) for n, held in groups.items()}, others)


TARGET = Target(
    name="nunchaku_mxfp4",
    description="SVDQuant MXFP4 in tiles with a 16-bit branch, as auto-round writes it",
    readers="auto-round 0.16.1 (weights); Intel's fork of nunchaku",
    hardware="not public",
    refuse=refuse,
    losses=losses,
    write=write,
    detect=detect,
    read=read,
)
