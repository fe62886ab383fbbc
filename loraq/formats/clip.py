"""MSE clip search: per block, the stored scale of least squared error among some candidates."""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.formats.scales import E8M0_NAN, block_scales, divisor, scale_values
from loraq.formats.table import Format

SHRINK = tuple(1.0 - 0.025 * step for step in range(1, 17))  # 0.975 … 0.6
EXPONENT_STEPS = (1, -1, -2)
MARGIN = 1.0 - 1e-5  # a candidate must win by more than fp32's summation error


def search_scales(
    blocks: Tensor, absmax: Tensor, fmt: Format, tensor_scale: Tensor | None
) -> Tensor:
    """blocks [..., n, block], absmax [..., n] -> stored scales [..., n]; never worse than none."""
    best = block_scales(absmax, fmt, tensor_scale)
    least = _squared_error(blocks, best, fmt, tensor_scale)
    first = best
    steps: tuple[float, ...] = EXPONENT_STEPS if fmt.scale == "e8m0" else SHRINK
    for step in steps:
        if fmt.scale == "e8m0":
            moved = (first.to(torch.int16) + int(step)).clamp_(0, E8M0_NAN - 1).to(torch.uint8)
            candidate = torch.where(first == E8M0_NAN, first, moved)
        else:
            candidate = block_scales(absmax * step, fmt, tensor_scale)
        error = _squared_error(blocks, candidate, fmt, tensor_scale)
        better = error < least * MARGIN
        best = torch.where(better, candidate, best)
        least = torch.where(better, error, least)
    return best


def _squared_error(
    blocks: Tensor, stored: Tensor, fmt: Format, tensor_scale: Tensor | None
) -> Tensor:
    scale = scale_values(stored, fmt, tensor_scale)
    values = fmt.element.round_(blocks / divisor(scale).unsqueeze(-1))
    return values.mul_(scale.unsqueeze(-1)).sub_(blocks).square_().sum(-1)
