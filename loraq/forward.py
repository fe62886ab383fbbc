"""The quantised layer's equation: the definition that every fast path is held against.

    y = Qa(x̃)·Wqᵀ + Qba(Qba(x̃)·Rᵀ)·Lᵀ + bias̃        x̃ = transform of x  (method.md, "The layer")

Emulated: operands are rounded to the values of their formats, products are formed in x's dtype
(float32 on CPU). Shapes: x_TI any leading axes × in, weight_OI, right_RI, left_OR, bias_O; with a
leading axis on all of them it is a batch of layers.
"""

from __future__ import annotations

from torch import Tensor

from loraq.formats import Format, fake_quantize


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
    main_input = fake_quantize(x, activation).to(weight_OI.dtype)
    y = main_input @ weight_OI.mT
    if bias_O is not None:
        y += bias_O
    if right_RI is None or left_OR is None or branch_activation is None:
        return y
    branch_input = main_input
    if branch_activation != activation:
        branch_input = fake_quantize(x, branch_activation).to(weight_OI.dtype)
    intermediate = branch_input @ right_RI.mT
    if requantize_intermediate:
        intermediate = fake_quantize(intermediate, branch_activation).to(weight_OI.dtype)
    y += intermediate @ left_OR.mT
    return y
