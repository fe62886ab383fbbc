"""Packing of codes along the last axis.

4 bits: two codes per byte, even index in the low nibble. 6 bits: four codes in three bytes,
little-endian `c0 | c1<<6 | c2<<12 | c3<<18`, the end of a row rounded up to bytes. 8 bits: one code
per byte.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of a row of `count` codes."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes [..., n] -> uint8 bytes [..., packed_bytes(n, bits)]; bits: 4, 6 or 8."""
    count = codes.shape[-1]
    if bits == 8:
        return codes
    if bits == 4:
        if count % 2:
            codes = pad(codes, (0, 1))
        return codes[..., 0::2] | (codes[..., 1::2] << 4)
    c0, c1, c2, c3 = _groups(codes, 4).unbind(-1)
    triple = torch.stack([c0 | (c1 << 6), (c1 >> 2) | (c2 << 4), (c2 >> 4) | (c3 << 2)], dim=-1)
    return triple.flatten(-2)[..., : packed_bytes(count, bits)].contiguous()


def unpack(data: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: uint8 bytes [..., packed_bytes(count, bits)] -> codes [..., count]."""
    if bits == 8:
        return data
    if bits == 4:
        return torch.stack([data & 0xF, data >> 4], dim=-1).flatten(-2)[..., :count]
    b0, b1, b2 = _groups(data, 3).unbind(-1)
    codes = [b0 & 63, (b0 >> 6) | ((b1 & 15) << 2), (b1 >> 4) | ((b2 & 3) << 4), b2 >> 2]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]


def _groups(x: Tensor, size: int) -> Tensor:
    """[..., n] -> [..., ceil(n/size), size], zero-padded."""
    x = pad(x, (0, -x.shape[-1] % size))
    return x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
