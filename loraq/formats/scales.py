"""Scales: from the largest magnitude of a block to what is stored, and back to fp32.

Stored: fp16/bf16 tensors for int and uint, uint8 for E8M0 and for E4M3 (nvfp4).
The scale that divides is always the stored, already rounded one.
A block with NaN or Inf, or whose scale overflows, has a scale that is not finite: NaN block.
"""

from __future__ import annotations

import struct

import torch
from torch import Tensor

from loraq.formats.elements import EXPONENT_MASK, Element
from loraq.formats.table import E2M1, E4M3, Format

E8M0_BIAS = 127
E8M0_NAN = 255


def block_scales(absmax: Tensor, fmt: Format, tensor_scale: Tensor | None = None) -> Tensor:
    """fp32 block maxima -> stored scales of the same shape."""
    if fmt.scale == "e8m0":
        return e8m0_from_absmax(absmax, fmt.element, fmt.exponent)
    wanted = absmax / fmt.element.maximum
    if fmt.scale == "e4m3":
        if tensor_scale is not None:
            wanted = wanted / tensor_scale
        return e4m3_bytes(wanted)
    return wanted.to(torch.float16 if fmt.scale == "fp16" else torch.bfloat16)


def scale_values(stored: Tensor, fmt: Format, tensor_scale: Tensor | None = None) -> Tensor:
    """Stored scales -> the fp32 numbers that element values are multiplied with."""
    if fmt.scale == "e8m0":
        return e8m0_to_float(stored)
    if fmt.scale == "e4m3":
        values = E4M3.decode(stored)
        return values if tensor_scale is None else values * tensor_scale
    return stored.float()


def e8m0_offset(element: Element, rule: str) -> int:
    """What is added to the bits of absmax so that a carry into the exponent rounds as `rule` says.

    floor: never; ceil: any mantissa; even: mantissas that round up to 2 at the element's
    precision (the tie is odd below, so it rounds up); rceil: mantissas above the largest element's.
    """
    if rule == "floor":
        return 0
    if rule == "ceil":
        return 0x7FFFFF
    if rule == "even":
        return 1 << (22 - element.mantissa_bits)
    (bits,) = struct.unpack("<i", struct.pack("<f", element.maximum))
    return 0x7FFFFF - (bits & 0x7FFFFF)


def e8m0_from_absmax(absmax: Tensor, element: Element, rule: str) -> Tensor:
    """Shared exponent of a block as an E8M0 byte; all-zero blocks get 0 (2^-127), NaN/Inf 255."""
    bits = absmax.view(torch.int32)
    field = (bits.clamp(max=EXPONENT_MASK) + e8m0_offset(element, rule)) >> 23
    byte = (field - element.maximum_exponent).clamp_(0, E8M0_NAN - 1)
    return byte.masked_fill_(bits >= EXPONENT_MASK, E8M0_NAN).to(torch.uint8)


def e8m0_to_float(stored: Tensor) -> Tensor:
    """2^(byte-127); 255 is NaN; 0 is the subnormal 2^-127."""
    bits = (stored.to(torch.int32) << 23).clamp_(min=1 << 22)
    return bits.masked_fill_(stored == E8M0_NAN, 0x7FC00000).view(torch.float32)


def e4m3_bytes(wanted: Tensor) -> Tensor:
    """Positive fp32 -> E4M3 bytes, nearest, saturating at 448; not finite -> 0x7F (NaN)."""
    nan = ~wanted.isfinite()
    rounded = E4M3.round_(wanted.masked_fill(nan, 0.0))
    return E4M3.encode(rounded).masked_fill_(nan, 0x7F)


def nvfp4_tensor_scale(absmax: Tensor) -> Tensor:
    """fp32 scale that puts the largest block scale at 448: absmax / (448·6); 1 where that is 0."""
    scale = absmax / (E4M3.maximum * E2M1.maximum)
    return torch.where(scale == 0, torch.ones_like(scale), scale)
