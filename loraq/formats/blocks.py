"""Blocks along the last axis, and the stored scale of each block."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.nn.functional import pad

from loraq.formats.clip import search_scales
from loraq.formats.scales import block_scales, nvfp4_tensor_scale
from loraq.formats.table import Format

CHUNK_VALUES = 1 << 19  # values per chunk; with fewer, threads wait for each other more often


def row_chunks(rows_TI: Tensor) -> Iterator[slice]:
    """Slices of rows to process together: few enough for a CPU's cache; all rows on a GPU."""
    count = rows_TI.shape[0]
    step = (
        max(1, CHUNK_VALUES // rows_TI.shape[1]) if rows_TI.device.type == "cpu" else max(1, count)
    )
    return (slice(start, start + step) for start in range(0, max(1, count), step))


def block_length(fmt: Format, count: int) -> int:
    """Values per scale in a row of `count` values."""
    return count if fmt.block is None else min(fmt.block, count)


def to_blocks(x: Tensor, block: int) -> Tensor:
    """[..., I] -> [..., ceil(I/block), block]; a short last block is zero-padded (never stored)."""
    if x.shape[-1] % block:
        x = pad(x, (0, -x.shape[-1] % block))
    return x.reshape(*x.shape[:-1], x.shape[-1] // block, block)


def from_blocks(blocks: Tensor, count: int) -> Tensor:
    """The inverse of `to_blocks`."""
    return blocks.flatten(-2)[..., :count].contiguous()


def stored_scales(
    blocks: Tensor, absmax: Tensor, fmt: Format, tensor_scale: Tensor | None
) -> Tensor:
    """blocks [..., n, block] and their absmax [..., n] -> stored scales [..., n]."""
    if fmt.clip == "mse":
        return search_scales(blocks, absmax, fmt, tensor_scale)
    return block_scales(absmax, fmt, tensor_scale)


def find_tensor_scale(absmax: Tensor, fmt: Format) -> Tensor | None:
    """nvfp4's fp32 scale from block maxima [..., n]: one, one per row [..., 1], or None (fixed)."""
    if fmt.tensor_scale == "tensor":
        return nvfp4_tensor_scale(absmax.amax())
    if fmt.tensor_scale == "token":
        return nvfp4_tensor_scale(absmax.amax(-1, keepdim=True))
    return None
