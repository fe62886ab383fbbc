"""The quantised layer's equation, the definition that every back end must match.

    y = Qa(x̃)·Wqᵀ + Qba(Qba(x̃)·Rᵀ)·Lᵀ + bias̃        x̃ = transform of x  (method.md, "The layer")

Emulation: operands are fake-quantised, products use x's dtype (float32 on a CPU). Shapes: x_TI any
leading axes × in, weight_OI, right_RI, left_OR, bias_O; with a leading axis on all of them, a batch
of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.formats import Format
from loraq.formats.operator import fake_quantize, fake_quantize_each
from loraq.utils import batch_invariance


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x·Wᵀ with PyTorch's matmul (`utils.batch_invariance` has a faster product for some CPUs)."""
    return x @ w.mT


def onednn_product(x: Tensor, w: Tensor) -> Tensor:
    """x·Wᵀ with oneDNN. Inductor compiles that operator for constant weights only, so not here."""
    if torch.compiler.is_compiling():
        return torch.ops.loraq.onednn_product(x, w)
    return batch_invariance.onednn_product(x, w)


@torch.library.custom_op("loraq::onednn_product", mutates_args=())
def _onednn_operator(x: Tensor, w: Tensor) -> Tensor:
    return batch_invariance.onednn_product(x, w)


@_onednn_operator.register_fake
def _(x: Tensor, w: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], w.shape[0])


@dataclass(frozen=True)
class QuantizedInput:
    """The quantised input of a layer: main Qa(x̃), and the branch's intermediate Qba(Qba(x̃)·Rᵀ)."""

    main: Tensor
    intermediate: Tensor | None

    def __repr__(self) -> str:
        branch = None if self.intermediate is None else tuple(self.intermediate.shape)
        return f"QuantizedInput(main={tuple(self.main.shape)}, intermediate={branch})"


def quantized_linear(
    x: Tensor,
    weight_OI: Tensor,
    activation: Format,
    *,
    right_RI: Tensor | None = None,
    left_OR: Tensor | None = None,
    bias_O: Tensor | None = None,
    branch_activation: Format | None = None,
    requantize_intermediate: bool = True,
) -> Tensor:
    """y for a transformed x̃ and dequantised weights; without a branch if L or R is None."""
    if left_OR is None:
        right_RI = None
    quantized = quantize_input(
        x, weight_OI.dtype, activation, right_RI, branch_activation, requantize_intermediate
    )
    return multiply(quantized, weight_OI, left_OR, bias_O)


def quantize_input(
    x: Tensor,
    dtype: torch.dtype,
    activation: Format,
    right_RI: Tensor | None = None,
    branch_activation: Format | None = None,
    requantize_intermediate: bool = True,
    product: Callable[[Tensor, Tensor], Tensor] = matmul,
) -> QuantizedInput:
    """The part of the equation that layers with the same x̃, R and formats share."""
    if x.device.type == "cpu":
        x = x.contiguous()  # SANA's attention passes transposed inputs, slow to quantise on a CPU
    if right_RI is None or branch_activation is None:
        return QuantizedInput(fake_quantize(x, activation, dtype), None)
    formats = dict.fromkeys((activation, branch_activation))
    main, *others = fake_quantize_each(x, tuple(formats), dtype)
    intermediate = product(others[0] if others else main, right_RI)
    if requantize_intermediate:
        intermediate = fake_quantize(intermediate, branch_activation, dtype)
    return QuantizedInput(main, intermediate)


def multiply(
    quantized: QuantizedInput,
    weight_OI: Tensor,
    left_OR: Tensor | None,
    bias_O: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor] = matmul,
) -> Tensor:
    """The products with the weights: Qa(x̃)·Wqᵀ + bias̃ + Qba(…)·Lᵀ."""
    y = product(quantized.main, weight_OI)
    if bias_O is not None:
        y += bias_O
    if quantized.intermediate is not None and left_OR is not None:
        y += product(quantized.intermediate, left_OR)
    return y
