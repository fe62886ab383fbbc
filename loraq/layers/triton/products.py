"""Products of prepared operands, by MODE (`operands.py` says how each is stored).

    int      codes as int8 on integer tensor cores, exact in int32; block scales in fp32
    scaled   E2M1, E4M3 and E5M2 codes with E8M0 scales on tensor cores that multiply them
    values   16-bit values on 16-bit tensor cores, sums in fp32

An operand is [rows, K] with K padded to a multiple of STEP by zeros, and `rows` are inside the
matrix: no load needs a mask, which would hide from the compiler that 16 bytes can be read at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

FULL_AXIS = tl.constexpr(1 << 20)  # block of one scale per row or per tensor; no axis is longer


@triton.jit
def product(
    acc,
    a_ptr,
    a_scale_ptr,
    b_ptr,
    b_scale_ptr,
    a_rows,
    b_rows,
    K,
    a_stride,
    a_scale_row,
    a_scale_block,
    b_stride,
    b_scale_row,
    b_scale_block,
    A: tl.constexpr,
    A_BLOCK: tl.constexpr,
    B: tl.constexpr,
    B_BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
):
    """acc + values of a [M, K] times values of b [N, K] transposed, fp32 [M, N]."""
    a_codes: tl.constexpr = STEP // codes_per_byte(A, MODE)
    b_codes: tl.constexpr = STEP // codes_per_byte(B, MODE)
    a_at = a_ptr + a_rows[:, None] * a_stride + tl.arange(0, a_codes)[None, :]
    b_at = b_ptr + b_rows[:, None] * b_stride + tl.arange(0, b_codes)[None, :]
    a_scale_at = a_scale_ptr + a_rows * a_scale_row
    b_scale_at = b_scale_ptr + b_rows * b_scale_row
    if MODE == "int":
        a_scale, b_scale = tl.load(a_scale_at), tl.load(b_scale_at)
        if A_BLOCK >= FULL_AXIS and B_BLOCK >= FULL_AXIS:
            sums = tl.zeros(acc.shape, tl.int32)
            for _ in range(0, K, STEP):
                sums = tl.dot(tl.load(a_at), tl.trans(tl.load(b_at)), sums, out_dtype=tl.int32)
                a_at += a_codes
                b_at += b_codes
            acc += sums.to(tl.float32) * a_scale.to(tl.float32)[:, None] * b_scale[None, :]
        else:
            for k in range(0, K, STEP):
                sums = tl.dot(tl.load(a_at), tl.trans(tl.load(b_at)), out_dtype=tl.int32)
                following = tl.minimum(k + STEP, K - STEP)  # its scales arrive during this product
                a_next = tl.load(a_scale_at + following // A_BLOCK * a_scale_block)
                b_next = tl.load(b_scale_at + following // B_BLOCK * b_scale_block)
                acc += sums.to(tl.float32) * a_scale.to(tl.float32)[:, None] * b_scale[None, :]
                a_scale, b_scale = a_next, b_next
                a_at += a_codes
                b_at += b_codes
    elif MODE == "scaled":
        blocks: tl.constexpr = STEP // 32
        a_scale_at = a_scale_at[:, None] + tl.arange(0, blocks)[None, :]
        b_scale_at = b_scale_at[:, None] + tl.arange(0, blocks)[None, :]
        for _ in range(0, K, STEP):
            acc = tl.dot_scaled(
                tl.load(a_at), tl.load(a_scale_at), mx_name(A),
                tl.trans(tl.load(b_at)), tl.load(b_scale_at), mx_name(B), acc,
            )  # fmt: skip
            a_at += a_codes
            b_at += b_codes
            a_scale_at += blocks
            b_scale_at += blocks
    else:
        for _ in range(0, K, STEP):
            acc = tl.dot(tl.load(a_at), tl.trans(tl.load(b_at)), acc)
            a_at += a_codes
            b_at += b_codes
    return acc


@triton.constexpr_function
def codes_per_byte(E, MODE):
    """Codes in one stored element: two E2M1 codes share a byte if tensor cores read them so."""
    return 2 if MODE == "scaled" and E.bits == 4 else 1


@triton.constexpr_function
def mx_name(E):
    """The element's name for `tl.dot_scaled`."""
    return {4: "e2m1", 8: "e4m3" if E.fraction == 3 else "e5m2"}[E.bits]
