"""Kernel 1: quantise x̃ for the main layer and for the branch, reading it once."""

from __future__ import annotations

import triton
import triton.language as tl

from loraq.formats.triton.numbers import (
    absmax,
    block_scale,
    in_units,
    quantize_blocks,
    round_element,
    scale_value,
)


@triton.jit
def store_codes(
    codes,
    ptr,
    rows,
    inside,
    first,
    count,
    stride,
    BITS: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Store int32 codes [R, C] at the columns from `first`: 4-bit codes two per byte, else one."""
    if BITS == 4:
        low, high = tl.split(tl.reshape(codes, (R, C // 2, 2)))
        at = first // 2 + tl.arange(0, C // 2)
        mask = inside[:, None] & (at < (count + 1) // 2)[None, :]
        tl.store(ptr + rows[:, None] * stride + at[None, :], (low | (high << 4)).to(tl.uint8), mask)
    else:
        at = first + tl.arange(0, C)
        mask = inside[:, None] & (at < count)[None, :]
        tl.store(ptr + rows[:, None] * stride + at[None, :], codes.to(tl.uint8), mask)


@triton.jit
def quantize_tile(
    x,
    codes_ptr,
    scale_ptr,
    tensor_scale,
    rows,
    inside,
    first,
    count,
    stride,
    scale_stride,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Quantise fp32 [R, C] in blocks along the columns from `first`; store codes and scales.

    If `codes_ptr` points to floats, store their values instead, without the tensor's scale.
    """
    blocks: tl.constexpr = C // BLOCK
    block_tensor_scale = tl.broadcast_to(tensor_scale[:, None], (R, blocks))
    x = tl.reshape(x, (R, blocks, BLOCK))
    if codes_ptr.dtype.element_ty.is_floating():
        stored, scale = block_scale(absmax(x, 2), block_tensor_scale, E)
        values = round_element(in_units(x, scale, E), E) * scale_value(stored, E)[:, :, None]
        values = tl.reshape(values, (R, C))
        at = first + tl.arange(0, C)
        mask = inside[:, None] & (at < count)[None, :]
        tl.store(codes_ptr + rows[:, None] * stride + at[None, :], values, mask)
    else:
        codes, stored = quantize_blocks(x, block_tensor_scale, E)
        codes = tl.reshape(codes, (R, C))
        store_codes(codes, codes_ptr, rows, inside, first, count, stride, E.bits, R, C)
        at = first // BLOCK + tl.arange(0, blocks)
        mask = inside[:, None] & (at < tl.cdiv(count, BLOCK))[None, :]
        tl.store(scale_ptr + rows[:, None] * scale_stride + at[None, :], stored, mask)


@triton.jit
def quantize_input(
    x_ptr,
    codes_ptr,
    scale_ptr,
    branch_codes_ptr,
    branch_scale_ptr,
    tensor_scale_ptr,
    T,
    I,
    x_stride,
    stride,
    scale_stride,
    branch_stride,
    branch_scale_stride,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    BRANCH: tl.constexpr,
    BRANCH_BLOCK: tl.constexpr,
    HAS_TENSOR_SCALE: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """Quantise a tile of R tokens and C channels; BRANCH None: the branch reads the main codes."""
    rows, first = (tl.program_id(0) * R + tl.arange(0, R)).to(tl.int64), tl.program_id(1) * C
    inside = rows < T
    at = first + tl.arange(0, C)
    mask = inside[:, None] & (at < I)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + at[None, :], mask, other=0.0).to(tl.float32)
    tensor_scale = tl.full((R,), 1.0, tl.float32)
    if HAS_TENSOR_SCALE:
        tensor_scale = tl.load(tensor_scale_ptr + rows, inside, other=1.0)
    quantize_tile(
        x,
        codes_ptr,
        scale_ptr,
        tensor_scale,
        rows,
        inside,
        first,
        I,
        stride,
        scale_stride,
        E,
        BLOCK,
        R,
        C,
    )
    if BRANCH is not None:
        one = tl.full((R,), 1.0, tl.float32)
        quantize_tile(
            x,
            branch_codes_ptr,
            branch_scale_ptr,
            one,
            rows,
            inside,
            first,
            I,
            branch_stride,
            branch_scale_stride,
            BRANCH,
            BRANCH_BLOCK,
            R,
            C,
        )
