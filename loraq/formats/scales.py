"""Block scales: from a block's absmax to the stored scale, and back to fp32.

Stored: fp16/bf16 tensors for int and uint, uint8 for E8M0 and for E4M3 (nvfp4).
Values are divided by the stored (rounded) scale.
A block that contains NaN or Inf, or whose scale overflows, has a non-finite scale and decodes to
NaN.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from loraq.formats.elements import EXPONENT_MASK, Element
from loraq.formats.table import E2M1, E4M3, Format

E8M0_NAN = 255
LARGEST_POWER = 0x7F000000  # bits of 2^127, the largest power of two of fp32
LARGEST_BF16 = 255.0 * 2.0**120
E4M3_SMALLEST = 2.0**-9
E4M3_NAN = 0x7F
NAN_BITS = 0x7FC00000


def block_scales(absmax: Tensor, fmt: Format, tensor_scale: Tensor | None = None) -> Tensor:
    """fp32 block maxima -> stored scales of the same shape."""
    if fmt.scale == "e8m0":
        return e8m0_from_absmax(absmax, fmt.element, fmt.exponent)
    if fmt.scale == "e4m3":
        return e4m3_bytes(_e4m3_wanted(absmax, fmt, tensor_scale))
    if fmt.scale == "bf16":  # a scale that is rounded up beside fp32's limit would decode to Inf
        absmax = absmax.where(absmax.isinf(), absmax.clamp(max=LARGEST_BF16))
    wanted = _divided(absmax, fmt.element.maximum)
    return wanted.to(torch.float16 if fmt.scale == "fp16" else torch.bfloat16)


def scale_values(stored: Tensor, fmt: Format, tensor_scale: Tensor | None = None) -> Tensor:
    """Stored scales -> fp32 scales, which multiply the element values."""
    if fmt.scale == "e8m0":
        return e8m0_to_float(stored)
    if fmt.scale == "e4m3":
        values = E4M3.decode(stored)
        return values if tensor_scale is None else values * tensor_scale
    return stored.float()


def fake_quantize_scales(absmax: Tensor, fmt: Format, tensor_scale: Tensor | None = None) -> Tensor:
    """`scale_values(block_scales(absmax))`; E8M0 and E4M3 without the conversion to bytes."""
    if fmt.scale == "e8m0":
        return e8m0_to_float(_e8m0_field(absmax, fmt.element, fmt.exponent))
    if fmt.scale == "e4m3":
        values = _e4m3_round(_e4m3_wanted(absmax, fmt, tensor_scale))
        return values if tensor_scale is None else values.mul_(tensor_scale)
    return scale_values(block_scales(absmax, fmt), fmt)


def divisor(scale: Tensor) -> Tensor:
    """The scale with 0 replaced by Inf, so that blocks with scale 0 become zeros, not NaN."""
    return scale.masked_fill(scale == 0, float("inf"))


def e8m0_from_absmax(absmax: Tensor, element: Element, rule: str) -> Tensor:
    """Shared exponent of a block as an E8M0 byte; all-zero blocks get 0 (2^-127), NaN/Inf 255."""
    return _e8m0_field(absmax, element, rule).to(torch.uint8)


def e8m0_to_float(stored: Tensor) -> Tensor:
    """2^(byte - 127); 255 is NaN; 0 is fp32's subnormal 2^-127."""
    bits = (stored.to(torch.int32) << 23).clamp_(min=1 << 22)
    return bits.masked_fill_(bits == EXPONENT_MASK, NAN_BITS).view(torch.float32)


def e8m0_offset(element: Element, rule: str) -> int:
    """Offset added to the bits of absmax, so that the carry into the exponent implements `rule`.

    The mantissas that carry: floor: none; ceil: all but zero; even: those that round up to 2 at the
    element's precision (at the tie the mantissa is all ones, odd, so it rounds up); rceil: those
    above the mantissa of the element's maximum.
    """
    if rule == "floor":
        return 0
    if rule == "ceil":
        return 0x7FFFFF
    if rule == "even":
        return 1 << (22 - element.mantissa_bits)
    fraction = math.frexp(element.maximum)[0] * 2 - 1
    return 0x7FFFFF - round(fraction * 2**23)


def _e8m0_field(absmax: Tensor, element: Element, rule: str) -> Tensor:
    bits = absmax.view(torch.int32)
    field = bits.clamp(max=LARGEST_POWER).add_(e8m0_offset(element, rule)) >> 23
    field.sub_(element.maximum_exponent).clamp_(0, E8M0_NAN - 1)
    return field.masked_fill_(bits >= EXPONENT_MASK, E8M0_NAN)


def e4m3_bytes(wanted: Tensor) -> Tensor:
    """Positive fp32 -> nearest E4M3 bytes, saturating at 448; non-finite -> 0x7F (NaN)."""
    values = _e4m3_round(wanted)
    nan = values.isnan()
    return E4M3.encode(values.masked_fill(nan, 0.0)).masked_fill_(nan, E4M3_NAN)


def _e4m3_wanted(absmax: Tensor, fmt: Format, tensor_scale: Tensor | None) -> Tensor:
    wanted = _divided(absmax, fmt.element.maximum)
    if fmt.tensor_scale == "fixed_floor":
        return wanted.clamp_(min=E4M3_SMALLEST)
    return wanted if tensor_scale is None else wanted.div_(tensor_scale)


def _e4m3_round(wanted: Tensor) -> Tensor:
    return E4M3.round_(wanted + wanted * 0.0)  # Inf·0 is NaN, so that Inf does not saturate to 448


def nvfp4_tensor_scale(absmax: Tensor) -> Tensor:
    """absmax / (448·6) in fp32, so that the largest block scale is 448; 1 if absmax is 0."""
    scale = _divided(absmax, E4M3.maximum * E2M1.maximum)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _divided(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded: CUDA multiplies by the reciprocal of a Python number."""
    return x / x.new_full((), number)
