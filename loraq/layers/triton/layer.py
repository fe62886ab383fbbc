"""A layer prepared for the kernels: its operands, from which `launches.py` computes y."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loraq.formats import Format
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.layers.kernel_costs import architecture, kernels_are_faster
from loraq.layers.tensors import LayerTensors
from loraq.layers.triton.launches import launch_down, launch_input, launch_linear
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
            h = None if self.branch is None or other is None else self.branch.compute_h(other)
        return KernelInput(main, h, x.shape[:-1], x.dtype)

    def multiply(self, quantized: KernelInput) -> Tensor:
        """y [..., O] in x's dtype."""
        rows, device = quantized.main.codes.shape[0], quantized.main.codes.device
        y_TO = torch.empty(rows, self.weight.codes.shape[0], dtype=quantized.dtype, device=device)
        if y_TO.numel():
            branch = None
            if quantized.h is not None and self.branch is not None:
                branch = quantized.h, self.branch.left, self.branch.up
            with device_context(device):
                launch_linear(quantized.main, self.weight, self.main, self.bias_O, branch, y_TO)
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

    def compute_h(self, x: Operand) -> Operand:
        """h = x̃·Rᵀ, quantised or in the dtype of a 16-bit L."""
        T, rank, device = x.codes.shape[0], self.right.codes.shape[0], x.codes.device
        fmt, padded = self.intermediate, self.up.padded(rank)
        if fmt is None or fmt.family == "float":
            dtype = self.left.codes.dtype if fmt is None else FLOAT_DTYPES[fmt.name]
            create = torch.empty if padded == rank else torch.zeros
            values = create(T, padded, dtype=dtype, device=device)
            out = Operand(values, values, None, None, FULL_AXIS, rank)
        else:
            out = empty_operand(T, rank, fmt, self.up, device)
        if T:
            launch_down(x, self.right, self.down, out)
        return replace(out, codes=out.codes.to(self.up.dtype)) if out.element is None else out


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
