"""A layer ready for the kernels: its operands, and the launches of its equation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from loraq.formats import Format
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.layers.tensors import LayerTensors
from loraq.layers.triton.activations import quantise_input
from loraq.layers.triton.equation import down, linear
from loraq.layers.triton.operands import (
    WHOLE,
    Operand,
    Product,
    empty_operand,
    product_of,
    room,
    stored_operand,
)
from loraq.layers.triton.support import Equation, check

TOKENS = 32  # of a tile
OUTPUTS = 128


@dataclass(frozen=True)
class Held:
    """The input's part of the equation: Qa(x̃), Qba(h), and the shape that y will have."""

    main: Operand
    h: Operand | None
    leading: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Prepared:
    """One layer's operands and products; how `layers.backends.Compute` runs on a GPU."""

    dtype: torch.dtype
    activation: Format
    weight: Operand
    main: Product
    bias_O: Tensor | None
    branch: Branch | None

    def quantize(self, x: Tensor) -> Held:
        """Of an already transformed x̃ [..., I]."""
        x_TI = x.reshape(-1, x.shape[-1])
        x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
        branch = None if self.branch is None else self.branch.activation
        with on_device(x.device):
            main, other = quantised_input(x_TI, self.activation, branch)
            h = None if self.branch is None or other is None else launch_down(self.branch, other)
        return Held(main, h, x.shape[:-1], x.dtype)

    def multiply(self, held: Held) -> Tensor:
        """y [..., O] in x's type."""
        rows, device = held.main.codes.shape[0], held.main.codes.device
        y_TO = torch.empty(rows, self.weight.codes.shape[0], dtype=held.dtype, device=device)
        if y_TO.numel():
            with on_device(device):
                launch_linear(self, held, y_TO)
        return y_TO.view(*held.leading, y_TO.shape[1])


@dataclass(frozen=True)
class Branch:
    """L and R, and how x̃·Rᵀ and h·Lᵀ are formed."""

    activation: Format
    right: Operand
    left: Operand
    down: Product
    up: Product
    intermediate: Format | None  # of h; None: it stays in 16 bits


def prepare(tensors: LayerTensors, dtype: torch.dtype, device: torch.device) -> Prepared:
    """Raises Unsupported where the kernels cannot compute the layer's equation."""
    check(Equation.of(tensors), device)
    fmt = tensors.activation
    main = product_of(fmt, tensors.weight.format, device)
    bias = None if tensors.bias_O is None else tensors.bias_O.to(device, dtype)
    weight, branch = stored_operand(tensors.weight, device), _branch(tensors, device)
    return Prepared(dtype, fmt, weight, main, bias, branch)


def on_device(device: torch.device) -> AbstractContextManager:
    """Triton launches on the current GPU, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _branch(tensors: LayerTensors, device: torch.device) -> Branch | None:
    fmt = tensors.branch_activation
    if tensors.right is None or tensors.left is None or fmt is None:
        return None
    intermediate = fmt if tensors.requantize_intermediate else None
    return Branch(
        fmt,
        stored_operand(tensors.right, device),
        stored_operand(tensors.left, device),
        product_of(fmt, tensors.right.format, device),
        product_of(intermediate or tensors.left.format, tensors.left.format, device),
        intermediate,
    )


def quantised_input(
    x_TI: Tensor, fmt: Format, branch: Format | None
) -> tuple[Operand, Operand | None]:
    """x̃ in the main layer's and in the branch's format, from one reading."""
    main, other = room(x_TI, fmt), None
    if branch is not None:
        other = main if branch == fmt else room(x_TI, branch)
    parts = [main] if other is None or other is main else [main, other]
    written = [part for part in parts if part.element is not None]
    if written and x_TI.numel():
        launch_input(x_TI, written)
    return main, other


def launch_input(x_TI: Tensor, parts: Sequence[Operand]) -> None:
    """Fill the codes and scales of one operand or two."""
    T, width = x_TI.shape
    blocks = [min(part.block, triton.next_power_of_2(width)) for part in parts]
    C = max(*blocks, min(128, triton.next_power_of_2(width)), 32)
    R = max(1, min(TOKENS, 8192 // C))
    first, last = parts[0], parts[-1]
    quantise_input[(triton.cdiv(T, R), triton.cdiv(width, C))](
        x_TI,
        first.codes,
        first.scale,
        last.codes,
        last.scale,
        first.above_pointer,
        T,
        width,
        x_TI.stride(0),
        *first.strides,
        *last.strides,
        first.element,
        blocks[0],
        last.element if len(parts) > 1 else None,
        blocks[-1],
        first.above_each,
        R,
        C,
        enable_fp_fusion=False,
    )


def launch_down(branch: Branch, x: Operand) -> Operand:
    """h, quantised or in the type of a 16-bit L."""
    right, how, fmt = branch.right, branch.down, branch.intermediate
    T, rank, width, device = x.codes.shape[0], right.codes.shape[0], right.width, x.codes.device
    if fmt is None or fmt.family == "float":
        dtype = branch.left.codes.dtype if fmt is None else FLOAT_DTYPES[fmt.name]
        values = torch.empty(T, rank, dtype=dtype, device=device)
        out = Operand(values, values, 1.0, None, WHOLE, rank)
    else:
        out = empty_operand(T, rank, fmt, device)
    if T == 0:
        return out
    N = max(16, triton.next_power_of_2(rank))
    down[(triton.cdiv(T, TOKENS),)](
        x.codes,
        x.scale,
        x.above_pointer,
        right.codes,
        right.scale,
        out.codes,
        out.scale,
        T,
        width,
        rank,
        right.above,
        *x.strides,
        *right.strides,
        *out.strides,
        x.element,
        x.block,
        x.above_each,
        right.element,
        right.block,
        out.element,
        min(out.block, N),
        how.mode,
        how.step,
        how.type,
        TOKENS,
        N,
        enable_fp_fusion=True,
    )
    return out


def launch_linear(layer: Prepared, held: Held, y_TO: Tensor) -> None:
    """Both products and the bias into y."""
    x, weight, bias = held.main, layer.weight, layer.bias_O
    T, O = y_TO.shape
    h, left, up, rank = x, weight, layer.main, 0  # what no one reads where there is no branch
    if held.h is not None and layer.branch is not None:
        h, left, up, rank = held.h, layer.branch.left, layer.branch.up, held.h.width
    N = min(OUTPUTS, max(16, triton.next_power_of_2(O)))
    linear[(triton.cdiv(T, TOKENS), triton.cdiv(O, N))](
        x.codes,
        x.scale,
        x.above_pointer,
        weight.codes,
        weight.scale,
        h.codes,
        h.scale,
        left.codes,
        left.scale,
        y_TO if bias is None else bias,
        y_TO,
        T,
        weight.width,
        O,
        rank,
        weight.above,
        left.above,
        *x.strides,
        *weight.strides,
        *h.strides,
        *left.strides,
        y_TO.stride(0),
        x.element,
        x.block,
        x.above_each,
        weight.element,
        weight.block,
        h.element,
        h.block,
        left.element,
        left.block,
        layer.main.mode,
        layer.main.step,
        layer.main.type,
        up.mode if rank else None,
        up.step,
        up.type,
        bias is not None,
        TOKENS,
        N,
        enable_fp_fusion=True,
    )
