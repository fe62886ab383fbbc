"""Products of packed operands, by MODE.

    int      codes on int8 tensor cores, exact in int32; group scales in fp32
    scaled   E2M1, E4M3, E5M2 with E8M0 scales: `tl.dot_scaled`, native if Triton supports it
    decode   other values that are exact in bf16 with their scales (NVFP4, MXINT, MXFP6), and
             16-bit operands, on 16-bit tensor cores; sums in fp32

An operand is [rows, K]: 4-bit codes two per byte, other codes one per byte; E None: 16-bit values.
The two halves of a byte are columns 2k and 2k+1. Products of even and of odd columns are computed
separately and added, so that the columns need no interleaving.
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraq.layers.triton.numbers import decode, decode_integers, scale_value


@triton.jit
def load_half(ptr, rows, inside, k, odd: tl.constexpr, K, stride, E: tl.constexpr, C: tl.constexpr):
    """Codes (or 16-bit values) [rows, C] of the columns k + 2j + odd; zeros outside."""
    two: tl.constexpr = bits_of(E) == 4
    if two:
        at = k // 2 + tl.arange(0, C)
        mask = inside[:, None] & (at < (K + 1) // 2)[None, :]
        byte = tl.load(ptr + rows[:, None] * stride + at[None, :], mask, other=0)
        raw = (byte >> 4) if odd else (byte & 15)
    else:
        at = k + 2 * tl.arange(0, C) + odd
        mask = inside[:, None] & (at < K)[None, :]
        raw = tl.load(ptr + rows[:, None] * stride + at[None, :], mask, other=0)
    return raw


@triton.jit
def load_values(
    ptr,
    scale_ptr,
    rows,
    inside,
    k,
    odd: tl.constexpr,
    K,
    stride,
    scale_stride,
    E: tl.constexpr,
    BLOCK: tl.constexpr,
    C: tl.constexpr,
    TYPE: tl.constexpr,
):
    """Dequantised values [rows, C] of the columns k + 2j + odd, exact in TYPE."""
    raw = load_half(ptr, rows, inside, k, odd, K, stride, E, C)
    if E is None:
        values = raw
    else:
        at = k + 2 * tl.arange(0, C) + odd
        mask = inside[:, None] & (at < K)[None, :]
        scale_at = scale_ptr + rows[:, None] * scale_stride + (at // BLOCK)[None, :]
        stored = tl.load(scale_at, mask, other=0)
        values = tl.where(mask, decode(raw, E) * scale_value(stored, E), 0.0)
    return values.to(TYPE)


@triton.jit
def product(
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    a_rows,
    a_inside,
    b_rows,
    b_inside,
    K,
    a_stride,
    a_scale_stride,
    b_stride,
    b_scale_stride,
    A: tl.constexpr,
    A_BLOCK: tl.constexpr,
    B: tl.constexpr,
    B_BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
    TYPE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """fp32 [M, N] = values of a [M, K] times values of b [N, K] transposed."""
    acc = tl.zeros((M, N), tl.float32)
    half: tl.constexpr = STEP // 2
    for k in range(0, K, STEP):
        if MODE == "int":
            a0 = decode_integers(load_half(a_ptr, a_rows, a_inside, k, 0, K, a_stride, A, half), A)
            a1 = decode_integers(load_half(a_ptr, a_rows, a_inside, k, 1, K, a_stride, A, half), A)
            b0 = decode_integers(load_half(b_ptr, b_rows, b_inside, k, 0, K, b_stride, B, half), B)
            b1 = decode_integers(load_half(b_ptr, b_rows, b_inside, k, 1, K, b_stride, B, half), B)
            if half >= 32:
                part = tl.dot(a0, tl.trans(b0), out_dtype=tl.int32)
                part += tl.dot(a1, tl.trans(b1), out_dtype=tl.int32)
                products = part.to(tl.float32)
            else:  # int8 tensor cores need at least 32 columns; codes are exact in fp16
                products = tl.dot(a0.to(tl.float16), tl.trans(b0.to(tl.float16)))
                products += tl.dot(a1.to(tl.float16), tl.trans(b1.to(tl.float16)))
            a_at = a_scale_ptr + a_rows * a_scale_stride + k // A_BLOCK
            b_at = b_scale_ptr + b_rows * b_scale_stride + k // B_BLOCK
            a_scale = tl.load(a_at, a_inside, other=0).to(tl.float32)
            b_scale = tl.load(b_at, b_inside, other=0).to(tl.float32)
            acc += products * a_scale[:, None] * b_scale[None, :]
        elif MODE == "scaled":
            a = load_packed(a_ptr, a_rows, a_inside, k, K, a_stride, A, STEP)
            b = load_packed(b_ptr, b_rows, b_inside, k, K, b_stride, B, STEP)
            a_scale = load_scales(a_scale_ptr, a_rows, a_inside, k, K, a_scale_stride, STEP)
            b_scale = load_scales(b_scale_ptr, b_rows, b_inside, k, K, b_scale_stride, STEP)
            a_name: tl.constexpr = mx_name(A)
            b_name: tl.constexpr = mx_name(B)
            acc = tl.dot_scaled(a, a_scale, a_name, tl.trans(b), b_scale, b_name, acc)
        else:
            for odd in tl.static_range(2):
                a = load_values(
                    a_ptr, a_scale_ptr, a_rows, a_inside, k, odd, K, a_stride, a_scale_stride,
                    A, A_BLOCK, half, TYPE,
                )  # fmt: skip
                b = load_values(
                    b_ptr, b_scale_ptr, b_rows, b_inside, k, odd, K, b_stride, b_scale_stride,
                    B, B_BLOCK, half, TYPE,
                )  # fmt: skip
                acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def load_packed(ptr, rows, inside, k, K, stride, E: tl.constexpr, STEP: tl.constexpr):
    """Bytes of STEP columns for `tl.dot_scaled`: two E2M1 codes per byte, or one 8-bit code."""
    each: tl.constexpr = 2 if E.bits == 4 else 1
    at = k // each + tl.arange(0, STEP // each)
    mask = inside[:, None] & (at < (K + each - 1) // each)[None, :]
    return tl.load(ptr + rows[:, None] * stride + at[None, :], mask, other=0)


@triton.jit
def load_scales(ptr, rows, inside, k, K, stride, STEP: tl.constexpr):
    """E8M0 bytes of STEP columns, one per 32 columns; 2^0 outside."""
    at = k // 32 + tl.arange(0, STEP // 32)
    mask = inside[:, None] & (at < tl.cdiv(K, 32))[None, :]
    return tl.load(ptr + rows[:, None] * stride + at[None, :], mask, other=127)


@triton.constexpr_function
def bits_of(E):
    """Bits of a code; 16 for 16-bit values."""
    return 16 if E is None else E.bits


@triton.constexpr_function
def mx_name(E):
    """The element's name for `tl.dot_scaled`."""
    return {4: "e2m1", 8: "e4m3" if E.fraction == 3 else "e5m2"}[E.bits]
