"""fake_quantize: quantise and dequantise without codes. First version; tuned later."""

from __future__ import annotations

from torch import Tensor

from loraq.formats.clip import search_scales
from loraq.formats.quantize import (
    FLOATS,
    block_length,
    check_input,
    divisor,
    find_tensor_scale,
    to_blocks,
)
from loraq.formats.scales import block_scales, scale_values
from loraq.formats.table import Format


def fake_quantize(x: Tensor, fmt: Format) -> Tensor:
    """fp32 tensor with the bits of `dequantize(quantize(x, fmt))`; detached from autograd.

    NaN or Inf in a block, or a scale that overflows, make the whole block NaN (no check, no sync).
    """
    check_input(x)
    x = x.detach()
    if fmt.family == "float":
        return x.to(FLOATS[fmt.name]).float()
    rows = x.float().reshape(1, -1) if fmt.block == -1 else x.float()
    block = rows.shape[-1] if fmt.block == -1 else block_length(fmt, rows.shape[-1])
    blocks = to_blocks(rows, block)
    absmax = blocks.abs().amax(-1)
    tensor_scale = find_tensor_scale(absmax, fmt)
    if fmt.clip == "mse":
        stored = search_scales(blocks, absmax, fmt, tensor_scale)
    else:
        stored = block_scales(absmax, fmt, tensor_scale)
    scale = scale_values(stored, fmt, tensor_scale)
    values = fmt.element.round_(blocks / divisor(scale).unsqueeze(-1))
    values.mul_(scale.unsqueeze(-1))
    return values.flatten(-2)[..., : rows.shape[-1]].reshape(x.shape)
