"""A layer prepared for the kernels: its operands, and the kernel launches of its equation."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor

from loraq.formats import Format
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.layers.kernel_costs import architecture, kernels_are_faster
from loraq.layers.tensors import LayerTensors
from loraq.layers.triton.activations import quantize_input
from loraq.layers.triton.equation import down, linear
from loraq.layers.triton.operands import (
    FULL_AXIS,
    Operand,
    Product,
    allocate_operand,
    choose_product,
    empty_operand,
    stored_operand,
)
from loraq.layers.triton.support import Equation, check_supported
from loraq.layers.triton.tiles import choose_tile, has_large_memory

TILE_TOKENS = 32  # of the kernel that quantises


@dataclass(frozen=True)
class KernelInput:
    """The quantised input of a layer: Qa(x̃), Qba(h), and the leading axes and dtype of y."""

    main: Operand
    h: Operand | None
    leading: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class PreparedLayer:
    """The operands and products of one layer: the `Compute` of the kernels."""

    dtype: torch.dtype
    activation: Format
    weight: Operand
    main: Product
    bias_O: Tensor | None
    branch: Branch | None

    def __repr__(self) -> str:
        return f"PreparedLayer(weight={self.weight}, activation={self.activation.label})"

    def quantize(self, x: Tensor) -> KernelInput:
        """Quantise a transformed x̃ [..., I], and compute h."""
        x_TI = x.reshape(-1, x.shape[-1])
        x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
        branch = None if self.branch is None else self.branch.activation
        with device_context(x.device):
            down = None if self.branch is None else self.branch.down
            main, other = quantize_operands(x_TI, self.activation, self.main, branch, down)
            h = None if self.branch is None or other is None else launch_down(self.branch, other)
        return KernelInput(main, h, x.shape[:-1], x.dtype)

    def multiply(self, quantized: KernelInput) -> Tensor:
        """y [..., O] in x's dtype."""
        rows, device = quantized.main.codes.shape[0], quantized.main.codes.device
        y_TO = torch.empty(rows, self.weight.codes.shape[0], dtype=quantized.dtype, device=device)
        if y_TO.numel():
            with device_context(device):
                launch_linear(self, quantized, y_TO)
        return y_TO.view(*quantized.leading, y_TO.shape[1])


@dataclass(frozen=True)
class Branch:
    """L and R, and the products x̃·Rᵀ (down) and h·Lᵀ (up)."""

    activation: Format
    right: Operand
    left: Operand
    down: Product
    up: Product
    intermediate: Format | None  # of h; None: 16-bit floats


def prepare(tensors: LayerTensors, dtype: torch.dtype, device: torch.device) -> PreparedLayer:
    """Prepare a layer for inputs of `dtype`; raises Unsupported if it has no kernel."""
    check_supported(Equation.from_layer(tensors), device)
    fmt = tensors.activation
    main = choose_product(fmt, tensors.weight.format, device)
    bias = None if tensors.bias_O is None else tensors.bias_O.to(device, dtype)
    weight = stored_operand(tensors.weight, main, device)
    return PreparedLayer(dtype, fmt, weight, main, bias, _branch(tensors, device))


def is_faster(tensors: LayerTensors, device: torch.device) -> bool:
    """Whether the kernels of a layer are faster than its emulation, by the table of costs."""
    main = choose_product(tensors.activation, tensors.weight.format, device)
    return kernels_are_faster(main.mode, architecture(device))


def device_context(device: torch.device) -> AbstractContextManager[object]:
    """Makes `device` current: Triton launches kernels on the current GPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _branch(tensors: LayerTensors, device: torch.device) -> Branch | None:
    fmt = tensors.branch_activation
    if tensors.right is None or tensors.left is None or fmt is None:
        return None
    intermediate = fmt if tensors.requantize_intermediate else None
    left, right = tensors.left, tensors.right
    down = choose_product(fmt, right.format, device)
    up = choose_product(intermediate or left.format, left.format, device)
    up = up.narrowed(left.shape[-1])
    return Branch(
        fmt,
        stored_operand(right, down, device),
        stored_operand(left, up, device),
        down,
        up,
        intermediate,
    )


def quantize_operands(
    x_TI: Tensor,
    fmt: Format,
    product: Product,
    branch: Format | None = None,
    down: Product | None = None,
) -> tuple[Operand, Operand | None]:
    """x̃ in the formats of the main layer and of the branch, with one launch."""
    main, other = allocate_operand(x_TI, fmt, product), None
    if branch is not None and down is not None:
        shared = (branch, down) == (fmt, product)
        other = main if shared else allocate_operand(x_TI, branch, down)
    parts = [main] if other is None or other is main else [main, other]
    written = [part for part in parts if part.element is not None]
    if written and x_TI.numel():
        launch_input(x_TI, written)
    return main, other


def launch_input(x_TI: Tensor, parts: Sequence[Operand]) -> None:
    """Write the codes and scales of one or two operands (kernel 1)."""
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


def launch_down(branch: Branch, x: Operand) -> Operand:
    """h, quantised or in the dtype of a 16-bit L (kernel 2)."""
    right, product, fmt = branch.right, branch.down, branch.intermediate
    T, rank, device = x.codes.shape[0], right.codes.shape[0], x.codes.device
    padded = branch.up.padded(rank)
    if fmt is None or fmt.family == "float":
        dtype = branch.left.codes.dtype if fmt is None else FLOAT_DTYPES[fmt.name]
        create = torch.empty if padded == rank else torch.zeros
        values = create(T, padded, dtype=dtype, device=device)
        out = Operand(values, values, None, None, FULL_AXIS, rank)
    else:
        out = empty_operand(T, rank, fmt, branch.up, device)
    if T == 0:
        return out
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
    return replace(out, codes=out.codes.to(branch.up.dtype)) if out.element is None else out


def launch_linear(layer: PreparedLayer, quantized: KernelInput, y_TO: Tensor) -> None:
    """Both products and the bias, written to y (kernel 3)."""
    x, weight, bias = quantized.main, layer.weight, layer.bias_O
    T, O = y_TO.shape
    h, left, up, rank = x, weight, layer.main, 0  # unused arguments without a branch
    if quantized.h is not None and layer.branch is not None:
        branch = layer.branch
        h, left, up, rank = quantized.h, branch.left, branch.up, quantized.h.width
    one_sum = up.mode == layer.main.mode and (not rank or left.tensor_scale is None)
    tile = choose_tile({layer.main.mode, up.mode}, one_sum and has_large_memory(y_TO.device))
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
        layer.main.padded(x.width),
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
        layer.main.mode,
        layer.main.step,
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
