"""fake_quantize by PyTorch's operations: bitwise equal to dequantize(quantize(x)), without codes.

Rows are processed in chunks that fit in a CPU's cache, with in-place operations. No operation
synchronises with a GPU. `operator.py` chooses between these operations and a kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loraq.formats.blocks import block_length, row_chunks, stored_scales, to_blocks
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.formats.scales import divisor, fake_quantize_scales, nvfp4_tensor_scale, scale_values
from loraq.formats.table import Format

MAGNITUDE_MASK = 0x7FFFFFFF


def by_operations(x: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """`fake_quantize` of a checked x, on any device."""
    if fmt.family == "float":
        return x.to(FLOAT_DTYPES[fmt.name]).to(dtype)
    if x.numel() == 0:
        return torch.empty(x.shape, dtype=dtype, device=x.device)
    rows_TI = x.reshape(-1, x.shape[-1])
    out_TI = torch.empty(rows_TI.shape, dtype=dtype, device=x.device)
    chunks = list(row_chunks(rows_TI))
    scale, tensor_scale = None, None
    if fmt.block == -1:
        scale = _scale_per_tensor(rows_TI, chunks, fmt)
    elif fmt.tensor_scale == "tensor":
        tensor_scale = nvfp4_tensor_scale(_absmax(rows_TI, chunks))
    count = x.shape[-1]
    block = count if fmt.block == -1 else block_length(fmt, count)
    full = count - count % block  # columns in complete blocks
    scratch = torch.empty(rows_TI[chunks[0]].shape, dtype=torch.int32, device=x.device)
    for chunk in chunks:
        chunk_TI = rows_TI[chunk].float()
        result_TI = out_TI[chunk] if dtype == torch.float32 else torch.empty_like(chunk_TI)
        if fmt.tensor_scale == "token":
            tensor_scale = nvfp4_tensor_scale(chunk_TI.abs().amax(-1, keepdim=True))
        for columns, width in ((slice(0, full), block), (slice(full, count), count - full)):
            if width:
                values, result, buffer = (
                    tensor[:, columns].view(chunk_TI.shape[0], -1, width)
                    for tensor in (chunk_TI, result_TI, scratch[: chunk_TI.shape[0]])
                )
                _fake_quantize_blocks(values, result, buffer, fmt, scale, tensor_scale)
        if dtype != torch.float32:
            out_TI[chunk] = result_TI
    return out_TI.view(x.shape)


def _fake_quantize_blocks(
    values: Tensor,
    result: Tensor,
    buffer: Tensor,
    fmt: Format,
    scale: Tensor | None,
    tensor_scale: Tensor | None,
) -> None:
    """Write fake-quantised `values` [rows, n, block] to `result`; `scale`: one for all blocks."""
    if scale is None:
        torch.bitwise_and(values.view(torch.int32), MAGNITUDE_MASK, out=buffer)
        absmax = buffer.amax(-1).view(torch.float32)  # integers order like floats, NaN above all
        if fmt.clip == "none":
            scale = fake_quantize_scales(absmax, fmt, tensor_scale)
        else:
            stored = stored_scales(values, absmax, fmt, tensor_scale)
            scale = scale_values(stored, fmt, tensor_scale)
        scale = scale.unsqueeze(-1)
    torch.div(values, divisor(scale), out=result)
    fmt.element.round_(result, buffer).mul_(scale)


def _absmax(rows_TI: Tensor, chunks: list[slice]) -> Tensor:
    maxima = [rows_TI[chunk].float().abs().amax() for chunk in chunks]
    return torch.stack(maxima).amax()


def _scale_per_tensor(rows_TI: Tensor, chunks: list[slice], fmt: Format) -> Tensor:
    absmax = _absmax(rows_TI, chunks)
    if fmt.clip == "none":
        return fake_quantize_scales(absmax, fmt)
    blocks = to_blocks(rows_TI.float().reshape(1, -1), rows_TI.numel())
    stored = stored_scales(blocks, absmax.view(1, 1), fmt, None)
    return scale_values(stored, fmt).view(())
