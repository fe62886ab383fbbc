"""The quantised layer's equation: the definition that every fast path is held against.

    y = Qa(x̃)·Wqᵀ + Qba(Qba(x̃)·Rᵀ)·Lᵀ + bias̃        x̃ = transform of x  (method.md, "The layer")

Emulated: operands are rounded to the values of their formats, products are formed in x's dtype
(float32 on CPU). Shapes: x_TI any leading axes × in, weight_OI, right_RI, left_OR, bias_O; with a
leading axis on all of them it is a batch of layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loraq.formats import Format, fake_quantize


def matmul(x: Tensor, w: Tensor) -> Tensor:
    """x·Wᵀ as PyTorch forms it (`utils.batch_invariance` knows processors with a faster way)."""
    return x @ w.mT


@dataclass(frozen=True)
class QuantizedInput:
    """What a layer multiplies its weights with: Qa(x̃), and the branch's Qba(Qba(x̃)·Rᵀ)."""

    main: Tensor
    intermediate: Tensor | None


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
    """y for an already transformed x̃ and dequantised weights; no branch where L, R are None."""
    if left_OR is None:
        right_RI = None
    held = quantize_input(
        x, weight_OI.dtype, activation, right_RI, branch_activation, requantize_intermediate
    )
    return multiply(held, weight_OI, left_OR, bias_O)


def quantize_input(
    x: Tensor,
    dtype: torch.dtype,
    activation: Format,
    right_RI: Tensor | None = None,
    branch_activation: Format | None = None,
    requantize_intermediate: bool = True,
    product: Callable[[Tensor, Tensor], Tensor] = matmul,
) -> QuantizedInput:
    """The input's part of the equation, the same for layers that share x̃, R and formats."""
    x = x.contiguous()  # SANA's attention hands over transposed ones, many times slower to round
    main = fake_quantize(x, activation, dtype)
    if right_RI is None or branch_activation is None:
        return QuantizedInput(main, None)
    branch_input = main
    if branch_activation != activation:
        branch_input = fake_quantize(x, branch_activation, dtype)
    intermediate = product(branch_input, right_RI)
    if requantize_intermediate:
        intermediate = fake_quantize(intermediate, branch_activation, dtype)
    return QuantizedInput(main, intermediate)


def multiply(
    held: QuantizedInput,
    weight_OI: Tensor,
    left_OR: Tensor | None,
    bias_O: Tensor | None,
    product: Callable[[Tensor, Tensor], Tensor] = matmul,
) -> Tensor:
    """The weights' part: Qa(x̃)·Wqᵀ + bias̃ + (…)·Lᵀ."""
    y = product(held.main, weight_OI)
    if bias_O is not None:
        y += bias_O
    if held.intermediate is not None and left_OR is not None:
        y += product(held.intermediate, left_OR)
    return y
