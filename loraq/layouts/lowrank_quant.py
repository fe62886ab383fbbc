"""SVDQuant NVFP4 in nunchaku's tiles with an 8-bit branch, as cozy's gen-worker (7ff1749) reads it.

The main path is that of a single file. The branch is row-major, in int8 or E4M3 with float32 scales
of blocks of 32: `proj_down` (K, R) along K, `proj_up` (N, R) along R. The metadata `lowrank_quant`
names the type. Its reader decodes the branch to bfloat16, so it is emulated with those factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.errors import LoraqError
from loraq.formats import QuantizedTensor, dequantize
from loraq.formats.blocks import from_blocks, to_blocks
from loraq.formats.elements import FloatElement, IntegerElement
from loraq.formats.scales import scale_values
from loraq.formats.table import E4M3
from loraq.layers.tensors import LayerTensors
from loraq.layouts.files import check_tensors, read_metadata
from loraq.layouts.losses import sixteen_bits
from loraq.layouts.single_file import quantization, read_single, write_single
from loraq.layouts.targets import Contents, Source, Target
from loraq.layouts.tiled_layer import PRECISIONS, pack_layer, unpack_layer
from loraq.layouts.tiled_network import kernel_losses, refuse_layer, tiled_layers
from loraq.layouts.tiles import pack_vector

KEY = "lowrank_quant"
BLOCK = 32
NVFP4 = PRECISIONS["nvfp4"]
SMALLEST = 1e-12


@dataclass(frozen=True)
class Scheme:
    """A type of the branch: its largest value, and the element of ours that it equals."""

    name: str
    dtype: torch.dtype
    element: IntegerElement | FloatElement


SCHEMES = {
    "int8": Scheme("int8", torch.int8, IntegerElement(8)),
    "fp8_e4m3": Scheme("fp8_e4m3", torch.float8_e4m3fn, E4M3),
}


def refuse(source: Source, name: str) -> str | None:
    """Only linear layers of whole tiles in NVFP4, without shift or rotation."""
    return refuse_layer(source, name, [NVFP4.name], pads=False)


def losses(scheme: Scheme, source: Source) -> list[str]:
    """What rounding the branch again changes, measured on its factors, and the tiles' losses."""
    found, worst = kernel_losses(source, exact_scales=True), 0.0
    kept = again = 0
    for layer in source.layers.values():
        for values, own in _factors(layer):
            codes, scale = encode(values, own, scheme)
            error = float(
                (decode(codes, scale) - values).norm() / values.norm().clamp(min=SMALLEST)
            )
            kept, again = kept + (not error), again + bool(error)
            worst = max(worst, error)
    if again:
        found.append(
            f"{again} of {kept + again} factors of branches are rounded again to {scheme.name} in "
            f"blocks of {BLOCK}, R after the division by s (relative error up to {worst:.2g}). A "
            f"branch in int8 or mxint8 (for fp8_e4m3, mxfp8_e4m3) with block={BLOCK} and no "
            "smoothing is kept as it is."
        )
    if kept + again:
        found.append(
            "The branch is decoded to bfloat16; its input and its intermediate are not rounded to "
            "8 or 4 bits."
        )
    return [*found, sixteen_bits(source)]


def write(scheme: Scheme, source: Source, folder: Path) -> None:
    """One file; the tensor scales are float32."""
    layers, tensors = tiled_layers(source, BLOCK), {}
    rank = next(iter(layers.values())).rank
    for name, layer in layers.items():
        packed, held = source.layers[name], pack_layer(replace(layer, down_IR=None, up_OR=None))
        del held["wcscales"], held["wtscale"]
        tensors[name] = held | _tensor_scale(packed.weight) | _branch(packed, rank, scheme)
    kind = f"Nunchaku{type(source.network).__name__}"
    metadata = {KEY: scheme.name, "model_class": kind, **quantization(NVFP4, rank)}
    write_single(folder, source.network, tensors, source.other_tensors(), metadata)


def detect(scheme: Scheme, path: Path) -> bool:
    """By the metadata."""
    return read_metadata(path).get(KEY) == scheme.name


def read(scheme: Scheme, path: Path) -> Contents:
    """All layers, with the branch in bfloat16."""
    groups, others = read_single(path)
    layers = {}
    for name, held in groups.items():
        main = {suffix: t for suffix, t in held.items() if not suffix.startswith("proj_")}
        layer = unpack_layer(name, main, NVFP4, ("bias", "wcscales", "wtscale"), branch=False)
        if len({"wcscales", "wtscale"} & set(main)) != 1:
            raise LoraqError(f"'{name}' needs either wcscales or wtscale. Restore the file.")
        branch = {suffix: t for suffix, t in held.items() if suffix not in main}
        (out, width), rank = layer.weight.shape, _rank(name, branch)
        spec = {
            "proj_down": ((width, rank), scheme.dtype),
            "proj_down_scale": ((-(-width // BLOCK), rank), torch.float32),
            "proj_up": ((out, rank), scheme.dtype),
            "proj_up_scale": ((out, -(-rank // BLOCK)), torch.float32),
        }
        check_tensors(name, branch, spec)
        down_RI = decode(branch["proj_down"].T, branch["proj_down_scale"].T)
        up_OR = decode(branch["proj_up"], branch["proj_up_scale"])
        down_IR, up_OR = down_RI.T.bfloat16().contiguous(), up_OR.bfloat16()
        layers[name] = replace(layer, down_IR=down_IR, up_OR=up_OR)
    return Contents(layers, others)


def encode(values: Tensor, own: QuantizedTensor | None, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """(codes, scales of blocks of 32) of a matrix along its last axis, which may be padded.

    own: the same matrix in a format of ours, whose codes are kept if the scheme has them.
    """
    if own is not None and own.format.block == BLOCK and own.scale is not None:
        element = own.format.element
        digits = 0
        if isinstance(element, IntegerElement):  # mxint8: the same codes with 6 binary digits
            digits, element = element.fraction_bits, IntegerElement(element.bits, element.signed)
        if element == scheme.element:
            scale = scale_values(own.scale, own.format) * 2.0**-digits
            return own.codes.view(scheme.dtype), scale
    blocks = to_blocks(values, BLOCK)
    largest = scheme.element.maximum
    scale = (blocks.abs().amax(-1) / largest).clamp(min=SMALLEST)
    scaled = (blocks / scale[..., None]).clamp(-largest, largest)
    rounded = scaled.round() if scheme.dtype == torch.int8 else scaled
    return from_blocks(rounded, values.shape[-1]).to(scheme.dtype), scale


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 values of codes and their blocks' scales, along the last axis."""
    return from_blocks(to_blocks(codes.float(), BLOCK) * scale[..., None], codes.shape[-1])


def _factors(layer: LayerTensors) -> list[tuple[Tensor, QuantizedTensor | None]]:
    """(R / s, L) in float32, each with its packed form if that has the same values."""
    if layer.right is None or layer.left is None:
        return []
    plain = layer.transform.smooth_I is None
    right_RI = layer.transform.weight_back(dequantize(layer.right))
    return [(right_RI, layer.right if plain else None), (dequantize(layer.left), layer.left)]


def _branch(layer: LayerTensors, rank: int, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors of the branch, of `rank`; zeros where a layer has none or a smaller one."""
    device, (out, width) = layer.weight.codes.device, layer.weight.shape
    factors = _factors(layer) or [
        (torch.zeros(rank, width, device=device), None),
        (torch.zeros(out, rank, device=device), None),
    ]
    (down, down_scale), (up, up_scale) = (encode(*factor, scheme) for factor in factors)
    extra, blocks = rank - up.shape[1], rank // BLOCK - up_scale.shape[1]
    return {
        "proj_down": _padded(down, (0, 0, 0, extra)).T,
        "proj_down_scale": _padded(down_scale, (0, 0, 0, extra)).T,
        "proj_up": _padded(up, (0, extra)),
        "proj_up_scale": _padded(up_scale, (0, blocks)),
    }


def _padded(x: Tensor, sides: tuple[int, ...]) -> Tensor:
    return pad(x.view(torch.uint8) if x.element_size() == 1 else x, sides).view(x.dtype)


def _tensor_scale(weight: QuantizedTensor) -> dict[str, Tensor]:
    """In float32: one for all rows, or one for each."""
    scale = weight.tensor_scale
    if scale is not None and scale.dim():
        return {"wcscales": pack_vector(scale[:, 0])}
    return {"wtscale": torch.ones(1) if scale is None else scale.view(1)}


def _rank(name: str, branch: Mapping[str, Tensor]) -> int:
    down = branch.get("proj_down")
    if down is None or down.dim() != 2:
        raise LoraqError(f"'{name}.proj_down' is missing or no matrix. Restore the file.")
    return int(down.shape[1])


def _target(scheme: Scheme) -> Target:
    return Target(
        name=f"{KEY}_{scheme.name}",
        description=f"SVDQuant NVFP4 in tiles with a branch in {scheme.name}",
        readers="cozy's gen-worker 7ff1749",
        hardware="CUDA sm120",
        refuse=refuse,
        losses=partial(losses, scheme),
        write=partial(write, scheme),
        detect=partial(detect, scheme),
        read=partial(read, scheme),
    )


INT8, FP8 = (_target(scheme) for scheme in SCHEMES.values())
