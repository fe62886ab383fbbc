"""The equation with 16-bit operands on a GPU: two to four launches and one product for y.

    y = [Qa(x̃) | Qba(Qba(x̃)·Rᵀ)] · [Wq | L]ᵀ + bias̃

One kernel transforms and quantises x: it reads x once, and writes Qa(x̃) next to the columns for the
branch's intermediate. One product then sums the main layer, the branch and the bias in fp32, and y
is written once. `equation.py` is the definition; sums differ in the last bits of 16-bit numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.formats import Format
from loraq.formats.operator import (
    as_arguments,
    fake_quantize_into,
    from_arguments,
    launch_supported,
)
from loraq.layers.equation import QuantizedInput
from loraq.transforms.hadamard import matrix, rotate_by
from loraq.transforms.input_transform import InputTransform


def stack(weight_OI: Tensor, left_OR: Tensor | None) -> Tensor:
    """[Wq | L] (O, I + R)."""
    return weight_OI if left_OR is None else torch.cat([weight_OI, left_OR], 1)


def quantize_stacked(
    x: Tensor,
    transform: InputTransform,
    dtype: torch.dtype,
    activation: Format,
    right_RI: Tensor | None = None,
    branch_activation: Format | None = None,
    requantize_intermediate: bool = True,
) -> QuantizedInput:
    """[Qa(x̃) | Qba(Qba(x̃)·Rᵀ)] of x [..., I], as `main` [..., I + R] without an intermediate."""
    width, rank = x.shape[-1], 0 if right_RI is None else right_RI.shape[0]
    stacked = torch.empty(*x.shape[:-1], width + rank, dtype=dtype, device=x.device)
    main, h = stacked.split([width, rank], -1)
    if right_RI is None or branch_activation is None:
        _write(x, transform, [(activation, main)])
        return QuantizedInput(stacked, None)
    branch_input, results = main, [(activation, main)]
    if branch_activation != activation:
        branch_input = torch.empty(x.shape, dtype=dtype, device=x.device)
        results.append((branch_activation, branch_input))
    _write(x, transform, results)
    intermediate = branch_input @ right_RI.mT
    if requantize_intermediate:
        fake_quantize_into(intermediate, [(branch_activation, h)])
    else:
        h.copy_(intermediate)
    return QuantizedInput(stacked, None)


def _write(x: Tensor, transform: InputTransform, results: list[tuple[Format, Tensor]]) -> None:
    signs_I, rotation = transform.signs_I, None
    if signs_I is not None:  # an argument: CUDA graphs reuse memory that an operator keeps
        rotation = matrix(transform.block, x.device, x.dtype)
    torch.ops.loraq.quantize_transformed(
        x.detach(),
        transform.shift,
        transform.smooth_I,
        signs_I,
        rotation,
        *as_arguments(results),
    )


@torch.library.custom_op("loraq::quantize_transformed", mutates_args=("out", "second"))
def _operator(
    x: Tensor,
    shift: float,
    smooth: Tensor | None,
    signs: Tensor | None,
    rotation: Tensor | None,
    first_format: str,
    out: Tensor,
    second_format: str,
    second: Tensor | None,
) -> None:
    results = from_arguments(first_format, out, second_format, second)
    if not x.numel():
        return
    left = launch_supported(
        x, results, shift=shift, smooth_I=smooth, signs_I=signs, rotation=rotation
    )
    if left:
        x = InputTransform(smooth, shift=shift).input(x)
        if signs is not None and rotation is not None:
            x = rotate_by(x, signs, rotation)
        fake_quantize_into(x, left)
