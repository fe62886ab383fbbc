"""One kernel for fake_quantize: reads x once and writes it in one or two formats.

The same bits as `loraq.formats.fake`, which takes 10 to 25 passes over x on a GPU. The kernel can
transform x before: ((x + shift) / smooth)·signs·H, each step rounded to x's type as by PyTorch.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.formats.blocks import find_tensor_scale
from loraq.formats.table import Format
from loraq.formats.triton.numbers import (
    INTERPRETED,
    element_constants,
    fake_quantize_blocks,
    to_bfloat16,
    to_float32,
    token_scale,
)

INTERPRETER = tl.constexpr(INTERPRETED)
TILE = 4096
"""Values per program: 32 per thread."""
MAX_BLOCK = 1 << 14
INPUTS = (torch.float16, torch.bfloat16, torch.float32)


class Before(NamedTuple):
    """What happens to x before: shift, smooth_I, signs_I, and H [block, block] in x's type."""

    shift: float = 0.0
    smooth_I: Tensor | None = None
    signs_I: Tensor | None = None
    rotation: Tensor | None = None

    @property
    def nothing(self) -> bool:
        """Whether x is quantised as it is."""
        return not self.shift and all(tensor is None for tensor in self[1:])


NOTHING = Before()
ROTATIONS = (16, 32, 64, 128)
"""Sizes of H for which the kernel has the product."""


@triton.jit
def rounded(v, TYPE: tl.constexpr):
    """fp32 rounded to TYPE, in fp32."""
    if tl.bfloat16 == TYPE:
        v = to_float32(to_bfloat16(v))
    elif tl.float16 == TYPE:
        v = v.to(tl.float16).to(tl.float32)
    return v


@triton.jit
def transform(
    x, mask, columns, known, shift, smooth_ptr, signs_ptr, rotation_ptr,
    TYPE: tl.constexpr, SHIFT: tl.constexpr, SMOOTH: tl.constexpr, ROTATION: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """((x + shift) / smooth)·signs·H of a tile; ROTATION: size of H, or 0."""
    if SHIFT:
        x = tl.where(mask, rounded(x + shift, TYPE), 0.0)
    if SMOOTH:
        smooth = to_float32(tl.load(smooth_ptr + columns, known, other=1.0))
        x = rounded(tl.math.div_rn(x, tl.broadcast_to(smooth[None, :], (R, C))), TYPE)
    if ROTATION > 0:
        signs = tl.load(signs_ptr + columns, known, other=1).to(tl.float32)
        x = tl.reshape(x * signs[None, :], (R * C // ROTATION, ROTATION))
        at = tl.arange(0, ROTATION)
        h = tl.load(rotation_ptr + at[:, None] * ROTATION + at[None, :])
        if INTERPRETER:  # it cannot multiply bf16, which is exact in fp32
            x = tl.dot(x, to_float32(h), input_precision="ieee")
        else:
            x = tl.dot(x.to(TYPE), h, input_precision="ieee")
        x = rounded(tl.reshape(x, (R, C)), TYPE)
    return x


@triton.jit
def write_fake(
    x, ptr, scale_ptr, scale_stride, rows, inside, columns, mask, stride,
    E: tl.constexpr, PADDED: tl.constexpr, SCALES: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Write a tile x [R, C] in blocks of PADDED columns; SCALES: where nvfp4's fp32 scale is."""
    tensor_scale = tl.full((R,), 1.0, tl.float32)
    if SCALES == "rows":
        tensor_scale = token_scale(x)
    elif SCALES == "given":
        tensor_scale = tl.load(scale_ptr + rows * scale_stride, inside, other=1.0)
    blocks: tl.constexpr = C // PADDED
    each = tl.broadcast_to(tensor_scale[:, None], (R, blocks))
    y = tl.reshape(fake_quantize_blocks(tl.reshape(x, (R, blocks, PADDED)), each, E), (R, C))
    at = ptr + rows[:, None] * stride + columns[None, :]
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(at, to_bfloat16(y), mask)
    else:
        tl.store(at, y.to(ptr.dtype.element_ty), mask)


@triton.jit
def fake_quantize(
    x_ptr, out_ptr, second_ptr, scale_ptr, second_scale_ptr,
    smooth_ptr, signs_ptr, rotation_ptr, shift,
    T, inner, I, outer_stride, row_stride, column_stride,
    stride, second_stride, scale_stride, second_scale_stride,
    E: tl.constexpr, BLOCK: tl.constexpr, PADDED: tl.constexpr, SCALES: tl.constexpr,
    SECOND: tl.constexpr, SECOND_PADDED: tl.constexpr, SECOND_SCALES: tl.constexpr,
    SHIFT: tl.constexpr, SMOOTH: tl.constexpr, ROTATION: tl.constexpr,
    R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A tile of R rows and C columns, of which PADDED hold a block; SECOND None: one format.

    x is [outer, inner, I] with any strides, an output [outer · inner, I] with contiguous rows.
    """
    rows = tl.program_id(0) * R + tl.arange(0, R)
    inside = rows < T
    at = tl.program_id(1) * C + tl.arange(0, C)
    columns, known = at, at < I
    if BLOCK != PADDED:  # blocks that are no power of two: PADDED columns of the tile for each
        columns = at // PADDED * BLOCK + at % PADDED
        known = (at % PADDED < BLOCK) & (columns < I)
    mask = inside[:, None] & known[None, :]
    start = (rows // inner).to(tl.int64) * outer_stride + (rows % inner).to(tl.int64) * row_stride
    offsets = start[:, None] + columns.to(tl.int64)[None, :] * column_stride
    x = to_float32(tl.load(x_ptr + offsets, mask, other=0.0))
    x = transform(
        x, mask, columns, known, shift, smooth_ptr, signs_ptr, rotation_ptr,
        x_ptr.dtype.element_ty, SHIFT, SMOOTH, ROTATION, R, C,
    )  # fmt: skip
    rows = rows.to(tl.int64)
    write_fake(
        x, out_ptr, scale_ptr, scale_stride, rows, inside, columns, mask, stride,
        E, PADDED, SCALES, R, C,
    )  # fmt: skip
    if SECOND is not None:
        write_fake(
            x, second_ptr, second_scale_ptr, second_scale_stride, rows, inside, columns, mask,
            second_stride, SECOND, SECOND_PADDED, SECOND_SCALES, R, C,
        )  # fmt: skip


def supported(x: Tensor, fmt: Format, dtype: torch.dtype, before: Before = NOTHING) -> bool:
    """Whether the kernel has a format, for x and a result of `dtype` with memory of their own."""
    width = x.shape[-1]
    if before.rotation is not None:
        powers_of_two = _block(fmt, width) == _padded(fmt, width)
        if len(before.rotation) not in ROTATIONS or not powers_of_two:
            return False
    given = fmt.tensor_scale == "tensor" or (
        fmt.tensor_scale == "token" and _row(fmt, width) > MAX_BLOCK
    )
    if given and not before.nothing:  # a pass over x would find the scale of x, not of x̃
        return False
    return (
        type(x) is Tensor
        and (x.is_cuda or INTERPRETED)
        and x.dtype in INPUTS
        and dtype in INPUTS
        and fmt.family != "float"
        and fmt.clip == "none"
        and fmt.block != -1
        and _padded(fmt, width) <= MAX_BLOCK
    )


def _padded(fmt: Format, width: int) -> int:
    """Columns of a tile for one block: a power of two."""
    return triton.next_power_of_2(width if fmt.block is None else min(fmt.block, width))


def _row(fmt: Format, width: int) -> int:
    """Columns of a tile for a complete row: a power of two."""
    return triton.next_power_of_2(-(-width // _block(fmt, width))) * _padded(fmt, width)


def _block(fmt: Format, width: int) -> int:
    """Columns of x for one block: a short last or only block is a masked power of two."""
    if fmt.block is None or fmt.block >= width:
        return _padded(fmt, width)
    return fmt.block


def launch(x: Tensor, results: Sequence[tuple[Format, Tensor]], before: Before = NOTHING) -> None:
    """Write x [..., I] in one or two supported formats to outputs of its shape."""
    blocks = [(_block(fmt, x.shape[-1]), _padded(fmt, x.shape[-1])) for fmt, _ in results]
    if len(results) == 2 and blocks[0] != blocks[1] and any(b != padded for b, padded in blocks):
        launch(x, results[:1], before)
        launch(x, results[1:], before)
        return
    width = x.shape[-1]
    x = x.reshape(1, -1, width) if x.dim() < 3 else x.flatten(1, -2)
    T, C = x.shape[0] * x.shape[1], max(padded for _, padded in blocks)
    if any(fmt.tensor_scale == "token" for fmt, _ in results):
        row = _row(results[0][0], width)
        C = max(C, row if row <= MAX_BLOCK else 0)
    H = 0 if before.rotation is None else len(before.rotation)
    C = max(C, min(128, triton.next_power_of_2(width)), 16, H)
    (fmt, out), (last, second) = results[0], results[-1]
    R = max(1, min(TILE // C, triton.next_power_of_2(T)), 16 * H // C)
    programs = triton.cdiv(T, R), triton.cdiv(-(-width // blocks[0][0]) * blocks[0][1], C)
    scales = [_scales(x, fmt, programs[1] == 1) for fmt, _ in results]
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        fake_quantize[programs](
            x, out, second, scales[0][1], scales[-1][1],
            *(x if tensor is None else tensor for tensor in before[1:]), before.shift,
            T, x.shape[1], width, *x.stride(),
            out.view(-1, width).stride(0), second.view(-1, width).stride(0),
            scales[0][2], scales[-1][2],
            element_constants(fmt), *blocks[0], scales[0][0],
            element_constants(last) if len(results) > 1 else None, blocks[-1][1], scales[-1][0],
            before.shift != 0, before.smooth_I is not None, H,
            R, C,
            num_warps=4 if R * C <= TILE else 8,
            enable_fp_fusion=False,
        )  # fmt: skip


def _scales(x: Tensor, fmt: Format, whole_rows: bool) -> tuple[str, Tensor, int]:
    """Where the kernel finds nvfp4's fp32 scales, and the tensor that holds them with its stride.

    A tile of complete rows computes those of its rows.
    """
    if fmt.tensor_scale == "token" and whole_rows:
        return "rows", x, 0
    absmax = x.detach().float().abs().amax(-1) if fmt.tensor_scale in ("tensor", "token") else None
    if absmax is None:
        return "none", x, 0
    found = find_tensor_scale(absmax.view(-1, 1), fmt)
    assert found is not None
    return "given", found, int(fmt.tensor_scale == "token")
