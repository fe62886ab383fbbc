"""Launches of the kernels of a layer's equation, with operands as arguments."""

from __future__ import annotations

from collections.abc import Sequence

import triton
from torch import Tensor

from loraq.layers.triton.activations import quantize_input
from loraq.layers.triton.equation import down, linear
from loraq.layers.triton.operands import Operand, Product
from loraq.layers.triton.tiles import choose_tile, has_large_memory

TILE_TOKENS = 32  # of the kernel that quantises


def launch_input(x_TI: Tensor, parts: Sequence[Operand]) -> None:
    """Kernel 1: write the codes and scales of one or two operands."""
    T, width = x_TI.shape
    blocks = [min(part.block, triton.next_power_of_2(width)) for part in parts]
    C = max(*blocks, min(128, triton.next_power_of_2(width)), 32)
    R = max(1, min(TILE_TOKENS, 8192 // C))
    first, last = parts[0], parts[-1]
    quantize_input[(triton.cdiv(T, R), triton.cdiv(width, C))](
        x_TI,
        first.codes,
        first.scale,
        last.codes,
        last.scale,
        first.tensor_scale_pointer,
        T,
        width,
        x_TI.stride(0),
        *first.strides[:2],
        *last.strides[:2],
        first.element,
        blocks[0],
        last.element if len(parts) > 1 else None,
        blocks[-1],
        first.tensor_scale_per_row,
        R,
        C,
        enable_fp_fusion=False,
    )


def launch_down(x: Operand, right: Operand, product: Product, out: Operand) -> None:
    """Kernel 2: write h = x̃·Rᵀ, quantised or as 16-bit values."""
    T, rank = x.codes.shape[0], right.codes.shape[0]
    N = max(16, triton.next_power_of_2(rank))
    tile = choose_tile({product.mode}, large=False)
    warps = 8 if tile.outputs < N else tile.warps
    down[(triton.cdiv(T, tile.tokens),)](
        x.codes,
        x.scale,
        x.tensor_scale_pointer,
        right.codes,
        right.scale,
        out.codes,
        out.scale,
        T,
        product.padded(x.width),
        rank,
        right.tensor_scale_value,
        *x.strides,
        *right.strides,
        *out.strides[:2],
        x.element,
        x.block,
        x.tensor_scale_per_row,
        right.element,
        right.block,
        out.element,
        min(out.block, N),
        product.mode,
        product.step,
        tile.tokens,
        N,
        num_warps=warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )


def launch_linear(
    x: Operand,
    weight: Operand,
    main: Product,
    bias: Tensor | None,
    branch: tuple[Operand, Operand, Product] | None,
    y_TO: Tensor,
) -> None:
    """Kernel 3: write the products and the bias; branch: h, L and their product."""
    T, O = y_TO.shape
    h, left, up = branch or (x, weight, main)  # unused arguments without a branch
    rank = h.width if branch else 0
    one_sum = up.mode == main.mode and (not rank or left.tensor_scale is None)
    tile = choose_tile({main.mode, up.mode}, one_sum and has_large_memory(y_TO.device))
    N = min(tile.outputs, max(16, triton.next_power_of_2(O)))
    linear[(triton.cdiv(T, tile.tokens) * triton.cdiv(O, N),)](
        x.codes,
        x.scale,
        x.tensor_scale_pointer,
        weight.codes,
        weight.scale,
        h.codes,
        h.scale,
        left.codes,
        left.scale,
        y_TO if bias is None else bias,
        y_TO,
        T,
        main.padded(x.width),
        O,
        up.padded(rank),
        weight.tensor_scale_value,
        left.tensor_scale_value,
        *x.strides,
        *weight.strides,
        *h.strides,
        *left.strides,
        y_TO.stride(0),
        x.element,
        x.block,
        x.tensor_scale_per_row,
        weight.element,
        weight.block,
        h.element,
        h.block,
        left.element,
        left.block,
        main.mode,
        main.step,
        up.mode if rank else None,
        up.step,
        left.tensor_scale is not None,
        bias is not None,
        tile.tokens,
        N,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
