"""MSE clip search: the candidate scale with the least squared error, per block."""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.formats.scales import E8M0_NAN, block_scales, divisor, scale_values
from loraq.formats.table import Format

SHRINK = tuple(1.0 - 0.025 * step for step in range(1, 17))  # 0.975 … 0.6
EXPONENT_STEPS = (1.0, -1.0, -2.0)
MARGIN = 1.0 - 1e-5  # required improvement, above the error of fp32 sums


def search_scales(
    blocks: Tensor, absmax: Tensor, fmt: Format, tensor_scale: Tensor | None
) -> Tensor:
    """blocks [..., n, block], absmax [..., n] -> stored scales [..., n].

    No block's error exceeds that of the unclipped scale.
    """
    buffers = torch.empty_like(blocks), torch.empty_like(blocks, dtype=torch.int32)

    def squared_error(stored: Tensor) -> Tensor:
        scale = scale_values(stored, fmt, tensor_scale).unsqueeze(-1)
        values = torch.div(blocks, divisor(scale), out=buffers[0])
        return fmt.element.round_(values, buffers[1]).mul_(scale).sub_(blocks).square_().sum(-1)

    first = best = block_scales(absmax, fmt, tensor_scale)
    least = squared_error(first)
    steps = EXPONENT_STEPS if fmt.scale == "e8m0" else SHRINK
    for step in steps:
        if fmt.scale == "e8m0":
            candidate = _move_exponent(first, int(step))
        else:
            candidate = block_scales(absmax * step, fmt, tensor_scale)
        error = squared_error(candidate)
        better = error < least * MARGIN
        best = torch.where(better, candidate, best)
        least = torch.where(better, error, least)
    return best


def _move_exponent(stored: Tensor, step: int) -> Tensor:
    moved = (stored.to(torch.int16) + step).clamp_(0, E8M0_NAN - 1).to(torch.uint8)
    return torch.where(stored == E8M0_NAN, stored, moved)
