"""Quantise to packed codes and scales, and back.

    x [..., I]  ->  codes [..., bytes], scale [..., ceil(I/block)]  ->  fp32 [..., I]

`fake_quantize` (fake.py) gives the same bits as `dequantize(quantize(x))`, without packing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats.blocks import (
    block_length,
    find_tensor_scale,
    from_blocks,
    row_pieces,
    stored_scales,
    to_blocks,
)
from loraq.formats.packing import pack, packed_bytes, unpack
from loraq.formats.scales import block_scales, divisor, scale_values
from loraq.formats.table import Format

FLOATS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor as it is stored; every figure about its size comes from these tensors."""

    codes: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    shape: tuple[int, ...]
    format: Format

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """Suffix -> tensor, for a checkpoint."""
        named = {"codes": self.codes, "scale": self.scale, "tensor_scale": self.tensor_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rows(self, rows: slice) -> QuantizedTensor:
        """Some rows of a matrix; a scale that serves the whole tensor serves the part as well."""
        count = len(range(*rows.indices(self.shape[0])))

        def cut(scale: Tensor | None) -> Tensor | None:
            if scale is None:
                return None
            return scale[rows] if scale.dim() > 1 else scale.clone()  # each part stores its own

        return QuantizedTensor(
            self.codes[rows],
            cut(self.scale),
            cut(self.tensor_scale),
            (count, *self.shape[1:]),
            self.format,
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on a device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return QuantizedTensor.from_tensors(moved, self.shape, self.format)

    @staticmethod
    def from_tensors(
        tensors: dict[str, Tensor], shape: tuple[int, ...], fmt: Format
    ) -> QuantizedTensor:
        """The inverse of `tensors`."""
        return QuantizedTensor(
            tensors["codes"],
            tensors.get("scale"),
            tensors.get("tensor_scale"),
            tuple(shape),
            fmt,
        )


def stored_shapes(
    shape: tuple[int, ...], fmt: Format
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> (shape, type) of what `quantize` stores for a tensor of this shape."""
    leading, count = shape[:-1], shape[-1]
    if fmt.family == "float":
        return {"codes": (shape, FLOATS[fmt.name])}
    found = {"codes": ((*leading, packed_bytes(count, fmt.bits)), torch.uint8)}
    blocks = () if fmt.block == -1 else (*leading, -(-count // block_length(fmt, count)))
    found["scale"] = (blocks, FLOATS.get(fmt.scale, torch.uint8))
    if fmt.tensor_scale in ("tensor", "token"):
        per = () if fmt.tensor_scale == "tensor" else (*leading, 1)
        found["tensor_scale"] = (per, torch.float32)
    return found


def quantize(x: Tensor, fmt: Format) -> QuantizedTensor:
    """x [..., I] -> codes and scales.

    Raises LoraqError where x has NaN or Inf, or a block whose scale the scale's format cannot
    hold: nothing broken is stored.
    """
    check_input(x)
    x = x.detach()
    if fmt.family == "float":
        codes = x.to(FLOATS[fmt.name])
        check_finite(codes, x, fmt)
        return QuantizedTensor(codes, None, None, tuple(x.shape), fmt)
    rows_TI, block = _rows(x, fmt)
    absmax_TN = torch.cat([_blocks(rows_TI[p], block).abs().amax(-1) for p in row_pieces(rows_TI)])
    tensor_scale = find_tensor_scale(absmax_TN, fmt)
    stored = _stored(rows_TI, block, absmax_TN, fmt, tensor_scale)
    return _encode(x, fmt, stored, tensor_scale)


def quantize_with_scales(
    x: Tensor, fmt: Format, stored: Tensor, tensor_scale: Tensor | None = None
) -> QuantizedTensor:
    """x [..., I] -> the nearest codes under scales that are given, saturating beyond them.

    `stored` and `tensor_scale` have the shapes and types of `quantize(x, fmt)`'s. Raises
    LoraqError where they do not, where the format has no scales, or where x has NaN or Inf.
    """
    check_input(x)
    x = x.detach()
    if fmt.family == "float":
        raise LoraqError(f"Format '{fmt.label}' has no scales to be given. Use quantize.")
    if not all_finite(x):
        raise LoraqError("Cannot quantise NaN or Inf. Repair what made the tensor.")
    shape, dtype = stored_shapes(tuple(x.shape), fmt)["scale"]
    if tuple(stored.shape) != shape or stored.dtype != dtype:
        raise LoraqError(
            f"Scales of shape {tuple(stored.shape)} and type {stored.dtype} do not fit values of "
            f"shape {tuple(x.shape)} in format '{fmt.label}': give {shape} of {dtype}."
        )
    if (tensor_scale is None) != (fmt.tensor_scale not in ("tensor", "token")):
        raise LoraqError(
            f"Format '{fmt.label}' has tensor_scale={fmt.tensor_scale}: give one "
            "where that is tensor or token, and none elsewhere."
        )
    return _encode(x, fmt, stored, tensor_scale)


def _rows(x: Tensor, fmt: Format) -> tuple[Tensor, int]:
    """x as rows [T, I], and how many values of a row have one scale (all, where all rows share)."""
    count = x.shape[-1]
    return x.reshape(-1, count), count if fmt.block == -1 else block_length(fmt, count)


def _blocks(part_TI: Tensor, block: int) -> Tensor:
    return to_blocks(part_TI.float(), block)


def _stored(
    rows_TI: Tensor, block: int, absmax_TN: Tensor, fmt: Format, tensor_scale: Tensor | None
) -> Tensor:
    """Stored scales [T, n], one for all rows []; only a clip search looks at the values again."""
    if fmt.block == -1:
        values, absmax = rows_TI.float().reshape(1, 1, -1), absmax_TN.amax().view(1, 1)
        return stored_scales(values, absmax, fmt, tensor_scale).view(())
    if fmt.clip == "none":
        return block_scales(absmax_TN, fmt, tensor_scale)
    found = []
    for piece in row_pieces(rows_TI):
        own = None if tensor_scale is None else _of(tensor_scale, piece)
        blocks = _blocks(rows_TI[piece], block)
        found.append(stored_scales(blocks, absmax_TN[piece], fmt, own))
    return torch.cat(found)


def _of(scale: Tensor, rows: slice) -> Tensor:
    """The rows' own scales; one that serves all rows serves these."""
    return scale[rows] if scale.dim() else scale


def _encode(x: Tensor, fmt: Format, stored: Tensor, tensor_scale: Tensor | None) -> QuantizedTensor:
    """The packed codes of x under its stored scales, in pieces that bound the memory."""
    rows_TI, block = _rows(x, fmt)
    if fmt.block != -1:
        stored = stored.reshape(-1, stored.shape[-1])
        if tensor_scale is not None and tensor_scale.dim():
            tensor_scale = tensor_scale.reshape(-1, 1)
    scale = scale_values(stored, fmt, tensor_scale)
    check_finite(scale, x, fmt)
    by, coded = divisor(scale), []
    for piece in row_pieces(rows_TI):
        values = _blocks(rows_TI[piece], block) / _of(by, piece).unsqueeze(-1)
        coded.append(pack(from_blocks(fmt.element.quantize(values), x.shape[-1]), fmt.bits))
    named = {"codes": torch.cat(coded), "scale": stored, "tensor_scale": tensor_scale}
    shapes = stored_shapes(tuple(x.shape), fmt)
    kept = {name: named[name].reshape(shape) for name, (shape, _) in shapes.items()}
    return QuantizedTensor.from_tensors(kept, tuple(x.shape), fmt)


def dequantize(q: QuantizedTensor) -> Tensor:
    """Element value × scale, fp32, of q.shape; zeros are +0."""
    fmt = q.format
    if q.scale is None:
        return q.codes.float()
    values = fmt.element.decode(unpack(q.codes, fmt.bits, q.shape[-1]))
    scale = scale_values(q.scale, fmt, q.tensor_scale)
    if fmt.block == -1:
        return values.mul_(scale).add_(0.0)
    blocks = to_blocks(values, block_length(fmt, q.shape[-1]))
    return from_blocks(blocks.mul_(scale.unsqueeze(-1)).add_(0.0), q.shape[-1])


def stored_bits(shape: tuple[int, ...], fmt: Format) -> int:
    """8 · quantize(x).nbytes of an x of this shape, without making it."""
    *leading, count = shape
    rows = math.prod(leading)
    if fmt.family == "float":
        return 16 * rows * count
    scales = 1 if fmt.block == -1 else rows * -(-count // max(block_length(fmt, count), 1))
    scale_bits = 16 if fmt.scale in ("fp16", "bf16") else 8
    tensor_scales = {"tensor": 1, "token": rows}.get(fmt.tensor_scale, 0)
    return rows * packed_bytes(count, fmt.bits) * 8 + scales * scale_bits + tensor_scales * 32


def check_input(x: Tensor) -> None:
    """Raises LoraqError unless x is a float tensor with a last axis that has values."""
    if not x.is_floating_point():
        raise LoraqError(f"Cannot quantise a tensor of {x.dtype}: it must be a float tensor.")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise LoraqError(f"Cannot quantise shape {tuple(x.shape)}: the last axis has no values.")


def all_finite(x: Tensor) -> bool:
    """One pass without a copy: the extremes are NaN where anything is."""
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


def check_finite(values: Tensor, x: Tensor, fmt: Format) -> None:
    """Raises LoraqError unless `values`, which were made from x for `fmt`, are all finite."""
    bad = int((~values.isfinite()).sum())
    if not bad:
        return
    what = "values" if fmt.family == "float" else "block scales"
    head = f"{bad} of {values.numel()} {what} are not finite in format '{fmt.label}'"
    if not x.isfinite().all():
        raise LoraqError(f"{head}: the tensor holds NaN or Inf. Repair what made it.")
    remedy = "format bf16" if fmt.family == "float" else "scale='bf16' or an mx format"
    raise LoraqError(
        f"{head}: the largest magnitude is {float(x.abs().max()):.4g}, "
        f"too large for 16 bits of type fp16. Choose {remedy}."
    )
