"""Quantisation to packed codes and scales, and dequantisation.

    x [..., I]  ->  codes [..., bytes], scale [..., ceil(I/block)]  ->  fp32 [..., I]

`fake_quantize` (fake.py) is bitwise equal to `dequantize(quantize(x))`, without packing.
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
    row_chunks,
    stored_scales,
    to_blocks,
)
from loraq.formats.packing import pack, packed_bytes, unpack
from loraq.formats.scales import block_scales, divisor, scale_values
from loraq.formats.table import Format

FLOAT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor in packed form: codes, block scales and, for nvfp4, an fp32 tensor scale.

    shape: of the dequantised tensor. The stored tensors (docs/formats.md) are contiguous, copied if
    need be, as they are after loading: an SVD's factors are stored by columns.
    """

    codes: Tensor
    scale: Tensor | None
    tensor_scale: Tensor | None
    shape: tuple[int, ...]
    format: Format

    def __post_init__(self) -> None:
        for name, tensor in self.tensors().items():
            object.__setattr__(self, name, tensor.contiguous())

    def __repr__(self) -> str:
        return f"QuantizedTensor({self.format.label}, shape={self.shape}, nbytes={self.nbytes})"

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def tensors(self) -> dict[str, Tensor]:
        """The stored tensors by suffix (codes, scale, tensor_scale), for a checkpoint."""
        named = {"codes": self.codes, "scale": self.scale, "tensor_scale": self.tensor_scale}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def rows(self, rows: slice) -> QuantizedTensor:
        """A slice of the rows of a matrix; a scale per tensor is copied."""
        count = len(range(*rows.indices(self.shape[0])))

        def slice_scale(scale: Tensor | None) -> Tensor | None:
            if scale is None:
                return None
            return scale[rows] if scale.dim() > 1 else scale.clone()

        return QuantizedTensor(
            self.codes[rows],
            slice_scale(self.scale),
            slice_scale(self.tensor_scale),
            (count, *self.shape[1:]),
            self.format,
        )

    def to(self, device: torch.device | str) -> QuantizedTensor:
        """The same tensor on `device`."""
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
    """Suffix -> (shape, dtype) of the tensors that `quantize` stores for a tensor of this shape."""
    leading, count = shape[:-1], shape[-1]
    if fmt.family == "float":
        return {"codes": (shape, FLOAT_DTYPES[fmt.name])}
    found = {"codes": ((*leading, packed_bytes(count, fmt.bits)), torch.uint8)}
    blocks = () if fmt.block == -1 else (*leading, -(-count // block_length(fmt, count)))
    found["scale"] = (blocks, FLOAT_DTYPES.get(fmt.scale, torch.uint8))
    if fmt.tensor_scale in ("tensor", "token"):
        per = () if fmt.tensor_scale == "tensor" else (*leading, 1)
        found["tensor_scale"] = (per, torch.float32)
    return found


def quantize(x: Tensor, fmt: Format) -> QuantizedTensor:
    """x [..., I] -> packed codes and scales.

    Raises LoraqError if x contains NaN or Inf, or if a block's scale overflows the scale's format.
    """
    check_input(x)
    x = x.detach()
    if fmt.family == "float":
        codes = x.to(FLOAT_DTYPES[fmt.name])
        check_finite(codes, x, fmt)
        return QuantizedTensor(codes, None, None, tuple(x.shape), fmt)
    rows_TI, block = _as_rows(x, fmt)
    absmax_TN = torch.cat([_blocks(rows_TI[p], block).abs().amax(-1) for p in row_chunks(rows_TI)])
    tensor_scale = find_tensor_scale(absmax_TN, fmt)
    stored = _choose_scales(rows_TI, block, absmax_TN, fmt, tensor_scale)
    return _encode(x, fmt, stored, tensor_scale)


def quantize_with_scales(
    x: Tensor, fmt: Format, stored: Tensor, tensor_scale: Tensor | None = None
) -> QuantizedTensor:
    """x [..., I] -> the nearest codes under given scales, saturating.

    stored, tensor_scale: of the shapes and dtypes that `quantize(x, fmt)` stores. Raises LoraqError
    for other shapes or dtypes, for a format without scales, or if x contains NaN or Inf.
    """
    check_input(x)
    x = x.detach()
    if fmt.family == "float":
        raise LoraqError(f"Format '{fmt.label}' has no scales. Use quantize.")
    if not all_finite(x):
        raise LoraqError("Cannot quantise NaN or Inf. Fix the computation of the tensor.")
    shape, dtype = stored_shapes(tuple(x.shape), fmt)["scale"]
    if tuple(stored.shape) != shape or stored.dtype != dtype:
        raise LoraqError(
            f"Scales of shape {tuple(stored.shape)} and dtype {stored.dtype} do not fit values of "
            f"shape {tuple(x.shape)} in format '{fmt.label}'. Pass scales of shape {shape} and "
            f"dtype {dtype}."
        )
    if (tensor_scale is None) != (fmt.tensor_scale not in ("tensor", "token")):
        raise LoraqError(
            f"Format '{fmt.label}' has tensor_scale={fmt.tensor_scale}. Pass tensor_scale only "
            "for tensor_scale=tensor or token."
        )
    return _encode(x, fmt, stored, tensor_scale)


def _as_rows(x: Tensor, fmt: Format) -> tuple[Tensor, int]:
    """x as rows [T, I], and the block length (the row's length for one scale per tensor)."""
    count = x.shape[-1]
    return x.reshape(-1, count), count if fmt.block == -1 else block_length(fmt, count)


def _blocks(rows_TI: Tensor, block: int) -> Tensor:
    return to_blocks(rows_TI.float(), block)


def _choose_scales(
    rows_TI: Tensor, block: int, absmax_TN: Tensor, fmt: Format, tensor_scale: Tensor | None
) -> Tensor:
    """Stored scales [T, n], or [] for one scale per tensor."""
    if fmt.block == -1:
        values, absmax = rows_TI.float().reshape(1, 1, -1), absmax_TN.amax().view(1, 1)
        return stored_scales(values, absmax, fmt, tensor_scale).view(())
    if fmt.clip == "none":
        return block_scales(absmax_TN, fmt, tensor_scale)
    found = []
    for chunk in row_chunks(rows_TI):
        chunk_scale = None if tensor_scale is None else _scale_rows(tensor_scale, chunk)
        blocks = _blocks(rows_TI[chunk], block)
        found.append(stored_scales(blocks, absmax_TN[chunk], fmt, chunk_scale))
    return torch.cat(found)


def _scale_rows(scale: Tensor, rows: slice) -> Tensor:
    """The scales of `rows`; a scale per tensor unchanged."""
    return scale[rows] if scale.dim() else scale


def _encode(x: Tensor, fmt: Format, stored: Tensor, tensor_scale: Tensor | None) -> QuantizedTensor:
    """The packed codes of x under its stored scales, in chunks that limit memory."""
    rows_TI, block = _as_rows(x, fmt)
    if fmt.block != -1:
        stored = stored.reshape(-1, stored.shape[-1])
        if tensor_scale is not None and tensor_scale.dim():
            tensor_scale = tensor_scale.reshape(-1, 1)
    scale = scale_values(stored, fmt, tensor_scale)
    check_finite(scale, x, fmt)
    by, coded = divisor(scale), []
    for chunk in row_chunks(rows_TI):
        values = _blocks(rows_TI[chunk], block) / _scale_rows(by, chunk).unsqueeze(-1)
        coded.append(pack(from_blocks(fmt.element.quantize(values), x.shape[-1]), fmt.bits))
    named = {"codes": torch.cat(coded), "scale": stored, "tensor_scale": tensor_scale}
    shapes = stored_shapes(tuple(x.shape), fmt)
    kept = {name: named[name].reshape(shape) for name, (shape, _) in shapes.items()}
    return QuantizedTensor.from_tensors(kept, tuple(x.shape), fmt)


def dequantize(q: QuantizedTensor) -> Tensor:
    """Element value × scale in fp32, of shape q.shape; zeros are +0."""
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
    """8 · quantize(x).nbytes for an x of this shape, computed from the shape."""
    *leading, count = shape
    rows = math.prod(leading)
    if fmt.family == "float":
        return 16 * rows * count
    scales = 1 if fmt.block == -1 else rows * -(-count // max(block_length(fmt, count), 1))
    scale_bits = 16 if fmt.scale in ("fp16", "bf16") else 8
    tensor_scales = {"tensor": 1, "token": rows}.get(fmt.tensor_scale, 0)
    return rows * packed_bytes(count, fmt.bits) * 8 + scales * scale_bits + tensor_scales * 32


def check_input(x: Tensor) -> None:
    """Raise LoraqError unless x is a float tensor with a non-empty last axis."""
    if not x.is_floating_point():
        raise LoraqError(f"Cannot quantise a tensor of {x.dtype}. Pass a float tensor.")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise LoraqError(f"Cannot quantise shape {tuple(x.shape)}: the last axis is empty.")


def all_finite(x: Tensor) -> bool:
    """Whether all values are finite, without a copy: min and max are NaN if any value is."""
    return not x.numel() or bool(torch.stack(x.aminmax()).isfinite().all())


def check_finite(values: Tensor, x: Tensor, fmt: Format) -> None:
    """Raise LoraqError unless all `values`, computed from x in format `fmt`, are finite."""
    bad = int((~values.isfinite()).sum())
    if not bad:
        return
    what = "values" if fmt.family == "float" else "block scales"
    head = f"{bad} of {values.numel()} {what} are not finite in format '{fmt.label}'"
    if not x.isfinite().all():
        raise LoraqError(
            f"{head}: the tensor contains NaN or Inf. Fix the computation of the tensor."
        )
    remedy = "format bf16" if fmt.family == "float" else "scale='bf16' or an mx format"
    raise LoraqError(
        f"{head}: the largest magnitude is {float(x.abs().max()):.4g}, "
        f"too large for 16 bits of type fp16. Choose {remedy}."
    )
