"""fake_quantize, the hot path: the bits of dequantize(quantize(x)), without making codes.

Rows go through in pieces that stay in the processor's cache; within a piece every step is one
pass in place. No step looks at the values on the host, so nothing waits for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.formats.blocks import block_length, row_pieces, stored_scales, to_blocks
from loraq.formats.quantize import FLOATS, check_input
from loraq.formats.scales import divisor, hot_scale_values, nvfp4_tensor_scale, scale_values
from loraq.formats.table import Format

MAGNITUDE_MASK = 0x7FFFFFFF


def fake_quantize(x: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """x [..., I], any float type -> `dtype`, of fp32 with the bits of `dequantize(quantize(x))`.

    Detached from autograd. NaN or Inf in a block, or a scale that overflows, make the whole
    block NaN; unlike `quantize` nothing is raised, since that would cost a look at the values.
    """
    check_input(x)
    x = x.detach()
    if fmt.family == "float":
        return x.to(FLOATS[fmt.name]).to(dtype)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    rows_TI = x.reshape(-1, x.shape[-1])
    out_TI = torch.empty(rows_TI.shape, dtype=dtype, device=x.device)
    pieces = list(row_pieces(rows_TI))
    scale, tensor_scale = None, None
    if fmt.block == -1:
        scale = _whole_tensor_scale(rows_TI, pieces, fmt)
    elif fmt.tensor_scale == "tensor":
        tensor_scale = nvfp4_tensor_scale(_absmax(rows_TI, pieces))
    count = x.shape[-1]
    block = count if fmt.block == -1 else block_length(fmt, count)
    whole = count - count % block
    scratch = torch.empty(rows_TI[pieces[0]].shape, dtype=torch.int32, device=x.device)
    for piece in pieces:
        part_TI = rows_TI[piece].float()
        result_TI = out_TI[piece] if dtype == torch.float32 else torch.empty_like(part_TI)
        if fmt.tensor_scale == "token":
            tensor_scale = nvfp4_tensor_scale(part_TI.abs().amax(-1, keepdim=True))
        for columns, width in ((slice(0, whole), block), (slice(whole, count), count - whole)):
            if width:
                values, result, memory = (
                    tensor[:, columns].view(part_TI.shape[0], -1, width)
                    for tensor in (part_TI, result_TI, scratch[: part_TI.shape[0]])
                )
                _fake_blocks(values, result, memory, fmt, scale, tensor_scale)
        if dtype != torch.float32:
            out_TI[piece] = result_TI
    return out_TI.view(x.shape)


def _fake_blocks(
    values: Tensor,
    result: Tensor,
    memory: Tensor,
    fmt: Format,
    scale: Tensor | None,
    tensor_scale: Tensor | None,
) -> None:
    """Writes the quantised `values` [rows, n, block] to `result`; a `scale` given is for all."""
    if scale is None:
        torch.bitwise_and(values.view(torch.int32), MAGNITUDE_MASK, out=memory)
        absmax = memory.amax(-1).view(torch.float32)  # as integers: the same order, NaN on top
        if fmt.clip == "none":
            scale = hot_scale_values(absmax, fmt, tensor_scale)
        else:
            stored = stored_scales(values, absmax, fmt, tensor_scale)
            scale = scale_values(stored, fmt, tensor_scale)
        scale = scale.unsqueeze(-1)
    torch.div(values, divisor(scale), out=result)
    fmt.element.round_(result, memory).mul_(scale)


def _absmax(rows_TI: Tensor, pieces: list[slice]) -> Tensor:
    maxima = [rows_TI[piece].float().abs().amax() for piece in pieces]
    return torch.stack(maxima).amax()


def _whole_tensor_scale(rows_TI: Tensor, pieces: list[slice], fmt: Format) -> Tensor:
    absmax = _absmax(rows_TI, pieces)
    if fmt.clip == "none":
        return hot_scale_values(absmax, fmt)
    blocks = to_blocks(rows_TI.float().reshape(1, -1), rows_TI.numel())
    stored = stored_scales(blocks, absmax.view(1, 1), fmt, None)
    return scale_values(stored, fmt).view(())
