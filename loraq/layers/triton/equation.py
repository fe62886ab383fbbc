"""Kernels 2 and 3: the products of the layer's equation.

down        h = Qba(x̃)·Rᵀ, quantised in registers
linear      y = Qa(x̃)·Wqᵀ + Qba(h)·Lᵀ + bias̃, both products in one kernel
"""

from __future__ import annotations

import triton
import triton.language as tl

from loraq.layers.triton.activations import quantize_tile
from loraq.layers.triton.products import product


@triton.jit
def down(
    x_ptr,
    x_scale_ptr,
    x_tensor_scale_ptr,
    right_ptr,
    right_scale_ptr,
    out_ptr,
    out_scale_ptr,
    T,
    K,
    rank,
    right_tensor_scale,
    x_stride,
    x_scale_row,
    x_scale_block,
    right_stride,
    right_scale_row,
    right_scale_block,
    out_stride,
    out_scale_row,
    X: tl.constexpr,
    X_BLOCK: tl.constexpr,
    X_HAS_TENSOR_SCALE: tl.constexpr,
    RIGHT: tl.constexpr,
    RIGHT_BLOCK: tl.constexpr,
    OUT: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """h of M tokens and all ranks (at most N); OUT None: stored without quantisation."""
    rows, ranks = (tl.program_id(0) * M + tl.arange(0, M)).to(tl.int64), tl.arange(0, N)
    inside, known = rows < T, ranks < rank
    h = product(
        tl.zeros((M, N), tl.float32), x_ptr, x_scale_ptr, right_ptr, right_scale_ptr,
        tl.minimum(rows, T - 1), tl.minimum(ranks, rank - 1), K,
        x_stride, x_scale_row, x_scale_block, right_stride, right_scale_row, right_scale_block,
        X, X_BLOCK, RIGHT, RIGHT_BLOCK, MODE, STEP,
    )  # fmt: skip
    h = tl.where(known[None, :], h * right_tensor_scale, 0.0)  # the last block holds h alone
    if X_HAS_TENSOR_SCALE:
        h *= tl.load(x_tensor_scale_ptr + rows, inside, other=1.0)[:, None]
    if OUT is None:
        mask = inside[:, None] & known[None, :]
        tl.store(out_ptr + rows[:, None] * out_stride + ranks[None, :], h, mask)
    else:
        one = tl.full((M,), 1.0, tl.float32)
        quantize_tile(
            h, out_ptr, out_scale_ptr, one, rows, inside, 0, rank, out_stride, out_scale_row,
            OUT, OUT_BLOCK, M, N,
        )  # fmt: skip


@triton.jit
def linear(
    x_ptr,
    x_scale_ptr,
    x_tensor_scale_ptr,
    weight_ptr,
    weight_scale_ptr,
    h_ptr,
    h_scale_ptr,
    left_ptr,
    left_scale_ptr,
    bias_ptr,
    y_ptr,
    T,
    K,
    O,
    rank,
    weight_tensor_scale,
    left_tensor_scale,
    x_stride,
    x_scale_row,
    x_scale_block,
    weight_stride,
    weight_scale_row,
    weight_scale_block,
    h_stride,
    h_scale_row,
    h_scale_block,
    left_stride,
    left_scale_row,
    left_scale_block,
    y_stride,
    X: tl.constexpr,
    X_BLOCK: tl.constexpr,
    X_HAS_TENSOR_SCALE: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_BLOCK: tl.constexpr,
    H: tl.constexpr,
    H_BLOCK: tl.constexpr,
    LEFT: tl.constexpr,
    LEFT_BLOCK: tl.constexpr,
    MODE: tl.constexpr,
    STEP: tl.constexpr,
    BRANCH_MODE: tl.constexpr,
    BRANCH_STEP: tl.constexpr,
    LEFT_HAS_TENSOR_SCALE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
):
    """y of M tokens and N outputs; BRANCH_MODE None: no branch."""
    # Programs that run at once read a few tokens and all weights, which stay in the cache.
    tiles = tl.cdiv(O, N)
    rows = (tl.program_id(0) // tiles * M + tl.arange(0, M)).to(tl.int64)
    outs = (tl.program_id(0) % tiles * N + tl.arange(0, N)).to(tl.int64)
    inside, known = rows < T, outs < O
    safe_rows, safe_outs = tl.minimum(rows, T - 1), tl.minimum(outs, O - 1)
    y = product(
        tl.zeros((M, N), tl.float32), x_ptr, x_scale_ptr, weight_ptr, weight_scale_ptr,
        safe_rows, safe_outs, K,
        x_stride, x_scale_row, x_scale_block, weight_stride, weight_scale_row, weight_scale_block,
        X, X_BLOCK, WEIGHT, WEIGHT_BLOCK, MODE, STEP,
    )  # fmt: skip
    y *= weight_tensor_scale
    if X_HAS_TENSOR_SCALE:
        y *= tl.load(x_tensor_scale_ptr + rows, inside, other=1.0)[:, None]
    if BRANCH_MODE is not None:
        # Without a scale of its own, the product is summed in y's registers.
        up = product(
            tl.zeros((M, N), tl.float32) if LEFT_HAS_TENSOR_SCALE else y,
            h_ptr, h_scale_ptr, left_ptr, left_scale_ptr, safe_rows, safe_outs, rank,
            h_stride, h_scale_row, h_scale_block, left_stride, left_scale_row, left_scale_block,
            H, H_BLOCK, LEFT, LEFT_BLOCK, BRANCH_MODE, BRANCH_STEP,
        )  # fmt: skip
        y = y + up * left_tensor_scale if LEFT_HAS_TENSOR_SCALE else up
    if HAS_BIAS:
        y += tl.load(bias_ptr + outs, known, other=0.0).to(tl.float32)[None, :]
    mask = inside[:, None] & known[None, :]
    tl.store(y_ptr + rows[:, None] * y_stride + outs[None, :], y, mask)
