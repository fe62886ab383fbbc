"""An `EngineLayer` as the tensors that nunchaku's kernels read, and back.

    qweight        (N, K/2) int8      codes                    proj_down   (K, R)  factors of the
    wscales        (K/block, N)       scales of the blocks     proj_up     (N, R)  branch
    smooth_factor  (K)                divides x                bias        (N)
    wcscales (N), wtscale (1)         of NVFP4: the tensor scale, per row and for all

All but `wtscale` are in the order of `tiles.py`. N and K are padded to 128, R to 16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, get_format
from loraq.formats.packing import packed_bytes
from loraq.layouts.engine_layer import SCALE_NAMES, EngineLayer
from loraq.layouts.files import Spec, check_tensors
from loraq.layouts.tiles import (
    CODES,
    DOWN,
    GROUP_SCALES,
    MICRO_SCALES,
    RANK_TILE,
    TILE,
    UP,
    Tiles,
    pack_vector,
    padded,
    unpack_vector,
)

PAIRS = 128


@dataclass(frozen=True)
class Precision:
    """A 4-bit format of the kernels: its block, and how scales are stored.

    weight: of the codes. activation: what x is rounded to; both without the type of 16-bit scales.
    one: the stored scale of a padded block. scale: its type; None: the 16-bit type of the file.
    """

    name: str
    weight: Format
    activation: Format
    tiles: Tiles
    one: float
    scale: torch.dtype | None = None

    @property
    def block(self) -> int:
        """Values per scale."""
        assert self.weight.block is not None
        return self.weight.block

    def of(self, fmt: Format, dtype: torch.dtype) -> Format:
        """`fmt`, with scales of this 16-bit type if it has such."""
        return replace(fmt, scale=SCALE_NAMES[dtype]) if self.scale is None else fmt


_FIXED = get_format("nvfp4", tensor_scale="fixed")
PRECISIONS = {
    "int4": Precision("int4", get_format("int4"), get_format("int4"), GROUP_SCALES, 1.0),
    "nvfp4": Precision(
        "nvfp4", get_format("nvfp4"), _FIXED, MICRO_SCALES[16], 0x38, torch.float8_e4m3fn
    ),
    "mxfp4": Precision(
        *("mxfp4", get_format("mxfp4_e2m1"), get_format("mxfp4_e2m1", exponent="rceil")),
        *(MICRO_SCALES[32], 127, torch.uint8),
    ),
}


def precision_of(weight: Format) -> Precision | None:
    """The kernels' format with these codes; None for any other format."""
    for precision in PRECISIONS.values():
        kind = precision.weight
        if (weight.name, weight.block, weight.family) == (kind.name, kind.block, kind.family):
            return precision
    return None


def pack_layer(layer: EngineLayer) -> dict[str, Tensor]:
    """The tensors of a layer, padded; without a bias if it has none."""
    packed = layer.weight
    assert isinstance(packed, QuantizedTensor) and packed.scale is not None
    precision = precision_of(packed.format)
    assert precision is not None
    out, device = packed.shape[0], packed.codes.device
    scale = padded(packed.scale, (TILE, TILE // precision.block), precision.one)
    codes = padded(packed.codes, (TILE, TILE // 2))
    found = {
        "qweight": CODES.pack(codes).view(torch.int8),
        "wscales": precision.tiles.pack(scale).view(precision.scale or layer.dtype),
        "smooth_factor": _vector(layer.divisors_I()),
    }
    if layer.down_IR is not None and layer.up_OR is not None:
        found["proj_down"] = DOWN.pack(padded(layer.down_IR.T, (RANK_TILE, TILE)))
        found["proj_up"] = UP.pack(padded(layer.up_OR, (TILE, RANK_TILE)))
    if layer.bias_O is not None:
        found["bias"] = _vector(layer.bias_O)
    if precision.name == "nvfp4":
        rows_O, whole = tensor_scales(packed.tensor_scale, out, layer.dtype, device)
        found |= {"wcscales": _vector(rows_O), "wtscale": whole}
    return found


def layer_spec(
    precision: Precision, out: int, width: int, rank: int | None, dtype: torch.dtype
) -> Spec:
    """Shapes and types of the tensors of a layer, of the padded sizes; rank None: no factors."""
    spec = {
        "qweight": ((out, width // 2), torch.int8),
        "wscales": ((width // precision.block, out), precision.scale or dtype),
        "smooth_factor": ((width,), dtype),
        "bias": ((out,), dtype),
    }
    if rank is not None:
        spec |= {"proj_down": ((width, rank), dtype), "proj_up": ((out, rank), dtype)}
    if precision.name == "nvfp4":
        kinds = (dtype, torch.float32)
        spec |= {"wcscales": ((out,), kinds), "wtscale": ((1,), kinds)}
    return spec


def unpack_layer(
    name: str,
    held: Mapping[str, Tensor],
    precision: Precision,
    optional: Sequence[str] = ("bias",),
    *,
    branch: bool = True,
) -> EngineLayer:
    """The inverse of `pack_layer`, of the padded sizes; LoraqError names a tensor that is wrong.

    optional: tensors that may be missing. branch: whether `held` has the factors of one.
    """
    for suffix in ("qweight", *(("proj_down",) if branch else ())):
        if suffix not in held or held[suffix].dim() != 2:
            raise LoraqError(f"'{name}.{suffix}' is missing or no matrix. Restore the file.")
    out, width = held["qweight"].shape[0], 2 * held["qweight"].shape[1]
    dtype = held["smooth_factor"].dtype if "smooth_factor" in held else torch.bfloat16
    if dtype not in SCALE_NAMES:
        raise LoraqError(f"'{name}.smooth_factor' is {dtype}, and this layout has 16-bit floats.")
    rank = held["proj_down"].shape[1] if branch else None
    check_tensors(name, held, layer_spec(precision, out, width, rank, dtype), optional)
    return EngineLayer(
        weight=unpack_weight(held, precision, dtype),
        activation=precision.of(precision.activation, dtype),
        dtype=dtype,
        smooth_I=unpack_vector(held["smooth_factor"]),
        down_IR=DOWN.unpack(held["proj_down"]).T.contiguous() if branch else None,
        up_OR=UP.unpack(held["proj_up"]) if branch else None,
        intermediate=dtype,
        bias_O=unpack_vector(held["bias"]) if "bias" in held else None,
    )


def unpack_weight(
    held: Mapping[str, Tensor], precision: Precision, dtype: torch.dtype
) -> QuantizedTensor:
    """The codes and scales of a layer whose tensors were checked."""
    codes = CODES.unpack(held["qweight"].view(torch.uint8))
    raw = held["wscales"] if precision.scale is None else held["wscales"].view(torch.uint8)
    fmt, tensor_scale = precision.of(precision.weight, dtype), None
    if precision.name == "nvfp4":
        tensor_scale = torch.ones(len(codes), 1, device=codes.device)
        if "wcscales" in held:
            tensor_scale = unpack_vector(held["wcscales"]).float()[:, None]
        if "wtscale" in held:
            tensor_scale = tensor_scale * held["wtscale"].float()
        if bool((tensor_scale == tensor_scale[0]).all()):
            tensor_scale = tensor_scale[0, 0]
        else:
            fmt = replace(fmt, tensor_scale="token")
    shape = (codes.shape[0], 2 * codes.shape[1])
    return QuantizedTensor(codes, precision.tiles.unpack(raw), tensor_scale, shape, fmt)


def cut(layer: EngineLayer, rows: slice, width: int) -> EngineLayer:
    """Some outputs of a layer, and its first `width` inputs."""
    packed = layer.weight
    assert isinstance(packed, QuantizedTensor) and packed.scale is not None
    assert packed.format.block is not None
    part = packed.rows(rows)
    assert part.scale is not None
    weight = replace(
        part,
        codes=part.codes[:, : packed_bytes(width, packed.format.bits)],
        scale=part.scale[:, : -(-width // packed.format.block)],
        shape=(part.shape[0], width),
    )
    return replace(
        layer,
        weight=weight,
        smooth_I=None if layer.smooth_I is None else layer.smooth_I[:width],
        down_IR=None if layer.down_IR is None else layer.down_IR[:width],
        up_OR=None if layer.up_OR is None else layer.up_OR[rows],
        bias_O=None if layer.bias_O is None else layer.bias_O[rows],
    )


def tensor_scales(
    scale: Tensor | None, out: int, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """(scales per row (N), one scale (1)) of `dtype`, whose products are nearest to `scale`.

    scale: NVFP4's fp32 scale of the tensor, or of each row (N, 1); None is 1. Values that the type
    holds are kept, with ones for the others. Of others, the best of 128 products is taken: for one
    scale it is within 2⁻¹² in bfloat16, where the scale alone is within 2⁻⁸.
    """
    ones_O = torch.ones(out, dtype=dtype, device=device)
    if scale is None:
        return ones_O, ones_O[:1]
    values = scale.reshape(-1)
    if torch.equal(values.to(dtype).float(), values):
        return (values.to(dtype), ones_O[:1]) if scale.dim() else (ones_O, values.to(dtype))
    steps = torch.arange(PAIRS, device=scale.device)[:, None] / PAIRS
    wholes = (values.amax() * (1 + steps)).to(dtype)
    rows = (values / wholes.float()).to(dtype)
    errors = (wholes.float() * rows.float() / values - 1).abs().amax(1)
    best = int(errors.argmin())
    return ones_O * rows[best], wholes[best]


def _vector(values: Tensor) -> Tensor:
    return pack_vector(padded(values, (TILE,), 1.0))
