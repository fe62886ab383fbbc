"""Triton device functions for the rounding, codes and scales of `loraq.formats`.

An element is a tuple of constants (`element_constants`), so that branches on it are resolved at
compile time. Values are fp32 in element units.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl

from loraq.formats.elements import ROUNDER, FloatElement
from loraq.formats.scales import E4M3_SMALLEST, LARGEST_BF16, LARGEST_POWER, e8m0_offset
from loraq.formats.table import E2M1, E4M3, Format


class ElementConstants(NamedTuple):
    """The compile-time constants of a format's element and its stored scale."""

    floating: bool
    bits: int
    signed: bool
    maximum: float
    rounder: float  # ROUNDER of integers; of floats, per unit of the binade
    fraction: int  # fraction bits of integers, mantissa bits of floats
    minimum_exponent: int
    bias: int
    scale: str  # fp16 | bf16 | e8m0 | e4m3
    scale_floor: float  # least E4M3 scale
    e8m0_offset: int
    maximum_exponent: int


@cache
def element_constants(fmt: Format) -> ElementConstants:
    """The constants of a block format."""
    element = fmt.element
    floating = isinstance(element, FloatElement)
    fraction = element.mantissa_bits if isinstance(element, FloatElement) else element.fraction_bits
    return ElementConstants(
        floating=floating,
        bits=element.bits,
        signed=True if isinstance(element, FloatElement) else element.signed,
        maximum=element.maximum,
        rounder=ROUNDER * 2.0**-fraction,
        fraction=fraction,
        minimum_exponent=element.minimum_exponent if isinstance(element, FloatElement) else 0,
        bias=element.bias if isinstance(element, FloatElement) else 0,
        scale=fmt.scale,
        scale_floor=E4M3_SMALLEST if fmt.tensor_scale == "fixed_floor" else 0.0,
        e8m0_offset=e8m0_offset(element, fmt.exponent) if fmt.scale == "e8m0" else 0,
        maximum_exponent=element.maximum_exponent,
    )


INTERPRETED: bool = triton.knobs.runtime.interpret
_INTERPRETED = tl.constexpr(INTERPRETED)
_E4M3_MAXIMUM = tl.constexpr(E4M3.maximum)
_E4M3_ROUNDER = tl.constexpr(ROUNDER * 2.0**-E4M3.mantissa_bits)
_E4M3_SMALLEST = tl.constexpr(2.0**E4M3.minimum_exponent)
_NVFP4_MAXIMUM = tl.constexpr(E4M3.maximum * E2M1.maximum)
_LARGEST_POWER = tl.constexpr(LARGEST_POWER)
_LARGEST_BF16 = tl.constexpr(LARGEST_BF16)


@triton.jit
def to_bfloat16(v):
    """Round fp32 to bf16. Triton's interpreter truncates, so there it is done on the bits."""
    if _INTERPRETED:
        bits = v.to(tl.int32, bitcast=True)
        nearest = tl.where(v == v, bits + 0x7FFF + ((bits >> 16) & 1), bits)
        rounded = (nearest >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        rounded = v.to(tl.bfloat16)
    return rounded


@triton.jit
def to_float32(v):
    """16 bits or fp32 in fp32, exactly. Triton's interpreter errs for bf16's subnormal numbers."""
    if _INTERPRETED and v.dtype == tl.bfloat16:
        bits = v.to(tl.int16, bitcast=True).to(tl.int32) << 16
        exact = bits.to(tl.float32, bitcast=True)
    else:
        exact = v.to(tl.float32)
    return exact


@triton.jit
def clamp(v, low: tl.constexpr, high: tl.constexpr):
    """v in low..high; NaN stays NaN."""
    at_least = tl.maximum(v, low, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(at_least, high, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def round_float(v, maximum: tl.constexpr, rounder: tl.constexpr, smallest: tl.constexpr):
    """Round to nearest of a float element, ties to even, saturating; smallest: normal value."""
    v = clamp(v, -maximum, maximum)
    bits = v.to(tl.int32, bitcast=True) & 0x7F800000
    unit = tl.maximum(bits.to(tl.float32, bitcast=True), smallest) * rounder
    return (v + unit) - unit


@triton.jit
def round_element(v, E: tl.constexpr):
    """fp32 in element units -> nearest representable values; zeros are +0."""
    if E.floating:
        smallest: tl.constexpr = 2.0**E.minimum_exponent
        r = round_float(v, E.maximum, E.rounder, smallest)
    else:
        low: tl.constexpr = -E.maximum if E.signed else 0.0
        r = (clamp(v, low, E.maximum) + E.rounder) - E.rounder
    return r


@triton.jit
def encode(v, E: tl.constexpr):
    """fp32 in element units -> nearest codes, in the low bits of int32."""
    r = round_element(v, E)
    if E.floating:
        bits = r.to(tl.int32, bitcast=True)
        m: tl.constexpr = E.fraction
        normal = ((bits & 0x7FFFFFFF) >> (23 - m)) - ((127 - E.bias) << m)
        subnormal = (tl.abs(r) * (2.0 ** (m - E.minimum_exponent))).to(tl.int32)
        sign = (bits >> 31) & (1 << (E.bits - 1))
        codes = tl.where(normal >= (1 << m), normal, subnormal) | sign
    else:
        codes = (r * (2.0**E.fraction)).to(tl.int32) & ((1 << E.bits) - 1)
    return codes


@triton.jit
def decode_integers(codes, E: tl.constexpr):
    """Codes of an integer element -> int8, which also holds unsigned 4-bit codes."""
    if E.signed:
        half: tl.constexpr = 1 << (E.bits - 1)
        values = ((codes.to(tl.int32) ^ half) - half).to(tl.int8)
    else:
        values = codes.to(tl.int8)
    return values


@triton.jit
def decode(codes, E: tl.constexpr):
    """Codes -> fp32 values in element units."""
    if E.floating:
        code = codes.to(tl.int32)
        m: tl.constexpr = E.fraction
        magnitude = code & ((1 << (E.bits - 1)) - 1)
        subnormal = magnitude.to(tl.float32) * (2.0 ** (E.minimum_exponent - m))
        normal = ((magnitude << (23 - m)) + ((127 - E.bias) << 23)).to(tl.float32, bitcast=True)
        size = tl.where((magnitude >> m) == 0, subnormal, normal)
        values = tl.where((code >> (E.bits - 1)) > 0, -size, size)
    else:
        values = decode_integers(codes, E).to(tl.float32) * (2.0**-E.fraction)
    return values


@triton.jit
def scale_value(stored, E: tl.constexpr):
    """Stored scales -> fp32 scales, which multiply the element values."""
    if E.scale == "e8m0":
        bits = stored.to(tl.int32) << 23
        bits = tl.where(bits == 0x7F800000, 0x7FC00000, tl.maximum(bits, 1 << 22))
        value = bits.to(tl.float32, bitcast=True)
    elif E.scale == "e4m3":
        code = stored.to(tl.int32)
        subnormal = code.to(tl.float32) * 0.001953125  # 2^-9; scales are positive
        normal = ((code << 20) + (120 << 23)).to(tl.float32, bitcast=True)
        value = tl.where(code == 0x7F, float("nan"), tl.where(code < 8, subnormal, normal))
    else:
        value = stored.to(tl.float32)
    return value


@triton.jit
def block_scale(largest, tensor_scale, E: tl.constexpr):
    """fp32 block maxima and tensor scales -> (stored scales, their fp32 values)."""
    if E.scale == "e8m0":
        bits = largest.to(tl.int32, bitcast=True)
        field = (tl.minimum(bits, _LARGEST_POWER) + E.e8m0_offset) >> 23
        field = tl.minimum(tl.maximum(field - E.maximum_exponent, 0), 254)
        stored = tl.where(bits >= 0x7F800000, 255, field).to(tl.uint8)
        value = scale_value(stored, E)
    else:
        if E.scale == "bf16":
            finite = tl.minimum(largest, _LARGEST_BF16)
            largest = tl.where(largest < float("inf"), finite, largest)
        wanted = tl.math.div_rn(largest, tl.full(largest.shape, E.maximum, tl.float32))
        if E.scale == "e4m3":
            wanted = tl.math.div_rn(wanted, tensor_scale)
            if E.scale_floor > 0:
                wanted = tl.where(wanted < E.scale_floor, E.scale_floor, wanted)
            near = round_float(wanted, _E4M3_MAXIMUM, _E4M3_ROUNDER, _E4M3_SMALLEST)
            normal = (near.to(tl.int32, bitcast=True) >> 20) - (120 << 3)
            code = tl.where(normal >= 8, normal, (near * 512.0).to(tl.int32))
            stored = tl.where(wanted < float("inf"), code, 0x7F).to(tl.uint8)
            value = scale_value(stored, E) * tensor_scale
        elif E.scale == "bf16":
            stored = to_bfloat16(wanted)
            value = to_float32(stored)
        else:
            stored = wanted.to(tl.float16)
            value = stored.to(tl.float32)
    return stored, value


@triton.jit
def absmax(x, axis: tl.constexpr):
    """Largest magnitude along an axis; NaN if there is one.

    Computed on the bits as integers, which have the same order, with NaN above all.
    """
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


@triton.jit
def in_units(x, value, E: tl.constexpr):
    """x [rows, blocks, block] over the blocks' scales, correctly rounded; 0 where a scale is 0."""
    if E.scale == "e8m0":  # the reciprocal of a power of two is exact, and a product is faster
        units = x * tl.math.div_rn(tl.full(value.shape, 1.0, tl.float32), value)[:, :, None]
    else:
        divisor = tl.where(value == 0.0, float("inf"), value)[:, :, None]
        units = tl.math.div_rn(x, tl.broadcast_to(divisor, x.shape))
    return units


@triton.jit
def quantize_blocks(x, tensor_scale, E: tl.constexpr):
    """fp32 [rows, blocks, block] -> int32 codes of that shape and stored scales [rows, blocks]."""
    stored, value = block_scale(absmax(x, 2), tensor_scale, E)
    return encode(in_units(x, value, E), E), stored


@triton.jit
def fake_quantize_blocks(x, tensor_scale, E: tl.constexpr):
    """fp32 [rows, blocks, block] -> its dequantised values; a block with NaN becomes NaN."""
    _, value = block_scale(absmax(x, 2), tensor_scale, E)
    return round_element(in_units(x, value, E), E) * value[:, :, None]


@triton.jit
def token_scale(x):
    """nvfp4's fp32 scale of each row of a tile [rows, columns]; 1 for a row of zeros."""
    largest = absmax(x, 1)
    scale = tl.math.div_rn(largest, tl.full(largest.shape, _NVFP4_MAXIMUM, tl.float32))
    return tl.where(scale == 0.0, 1.0, scale)
