"""Element types of the formats (integers, ExMy floats): values, rounding and bit patterns.

Values are in element units (int4: -7..7; E2M1: 0, .5, 1, … 6); `scales.py` handles the scales.
Rounding is to nearest, ties to even, saturating, in fp32.

Rounding uses two identities. Adding and then subtracting 1.5·2^23·u rounds a float to a multiple of
u (a power of two), ties to even, and gives +0 for zero. The spacing u of the element's values near
v is a power of two, which follows from the exponent bits of v.

torch is imported in the functions that need it, so that the table of formats does not import it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from loraq.utils.constants import unless_traced

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXPONENT_MASK = 0x7F800000  # exponent bits of an fp32
ROUNDER = 1.5 * 2.0**23  # v + ROUNDER - ROUNDER = v rounded to an integer, for |v| <= 2^22


@dataclass(frozen=True)
class IntegerElement:
    """value = code · 2^-fraction_bits; code in -maximum_code..maximum_code, or 0.. if unsigned."""

    bits: int
    signed: bool = True
    fraction_bits: int = 0

    @property
    def maximum_code(self) -> int:
        """Largest code; the most negative two's complement code is never written."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def maximum(self) -> float:
        """Largest value, in element units."""
        return self.maximum_code * 2.0**-self.fraction_bits

    @property
    def maximum_exponent(self) -> int:
        """floor(log2(maximum)), OCP's emax."""
        return self.maximum_code.bit_length() - 1 - self.fraction_bits

    @property
    def mantissa_bits(self) -> int:
        """Bits after the leading one of the largest value (for the E8M0 rule `even`)."""
        return self.maximum_code.bit_length() - 1

    @property
    def finite_codes(self) -> tuple[int, ...]:
        """Every bit pattern that quantisation can write."""
        low = -self.maximum_code if self.signed else 0
        return tuple(code % 2**self.bits for code in range(low, self.maximum_code + 1))

    def round_(self, v: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Round `v` (fp32, element units) in place; NaN stays NaN; zeros become +0."""
        rounder = ROUNDER * 2.0**-self.fraction_bits
        v.clamp_(-self.maximum if self.signed else 0.0, self.maximum)
        return v.add_(rounder).sub_(rounder)

    def quantize(self, v: Tensor) -> Tensor:
        """fp32 in element units -> uint8 bit patterns of the nearest codes; overwrites `v`."""
        return self.encode(self.round_(v))

    def encode(self, values: Tensor) -> Tensor:
        """Representable values -> uint8 bit patterns in the low `bits` bits."""
        import torch

        codes = (values * float(2**self.fraction_bits)).to(torch.int16)
        return codes.bitwise_and_(2**self.bits - 1).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 bit patterns -> fp32 values; two's complement if signed."""
        return _lookup(self, codes)

    def table(self) -> list[float]:
        """The value of every bit pattern."""
        wrap = 2 ** (self.bits - 1) if self.signed else 2**self.bits
        integers = (c if c < wrap else c - 2**self.bits for c in range(2**self.bits))
        return [integer * 2.0**-self.fraction_bits for integer in integers]


@dataclass(frozen=True)
class FloatElement:
    """sign · 2^(exponent - bias) · 1.mantissa, with subnormals; `maximum`: largest finite value."""

    exponent_bits: int
    mantissa_bits: int
    maximum: float

    @property
    def bits(self) -> int:
        """Sign, exponent and mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def bias(self) -> int:
        """Exponent bias, 2^(exponent_bits-1) - 1 as in IEEE 754."""
        return (1 << (self.exponent_bits - 1)) - 1

    @property
    def minimum_exponent(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def maximum_exponent(self) -> int:
        """floor(log2(maximum)), OCP's emax."""
        return math.frexp(self.maximum)[1] - 1

    @property
    def finite_codes(self) -> tuple[int, ...]:
        """Every bit pattern of a finite value, both zeros included."""
        return tuple(c for c, v in enumerate(self.table()) if abs(v) <= self.maximum)

    def round_(self, v: Tensor, scratch: Tensor | None = None) -> Tensor:
        """Round `v` (fp32, element units) in place; NaN stays NaN; zeros become +0.

        scratch: int32 tensor of v's shape, overwritten.
        """
        import torch

        v.clamp_(-self.maximum, self.maximum)
        binade_bits = torch.bitwise_and(v.view(torch.int32), EXPONENT_MASK, out=scratch)
        binade = binade_bits.view(torch.float32).clamp_(min=2.0**self.minimum_exponent)
        alpha = ROUNDER * 2.0**-self.mantissa_bits
        return v.add_(binade, alpha=alpha).sub_(binade, alpha=alpha)

    def quantize(self, v: Tensor) -> Tensor:
        """fp32 in element units -> uint8 bit patterns of the nearest codes; -0 keeps its sign."""
        return self.encode(self.round_(v.clone()).copysign_(v))

    def encode(self, values: Tensor) -> Tensor:
        """Representable values -> uint8 bit patterns in the low `bits` bits; -0 keeps its sign."""
        import torch

        bits = values.view(torch.int32)
        magnitude = bits & 0x7FFFFFFF
        m = self.mantissa_bits
        normal = (magnitude >> (23 - m)) - ((127 - self.bias) << m)
        subnormal = (values.abs() * 2.0 ** (m - self.minimum_exponent)).to(torch.int32)
        codes = torch.where(normal >= 2**m, normal, subnormal)
        sign = (bits >> 31) & (1 << (self.bits - 1))
        return (codes | sign).to(torch.uint8)

    def decode(self, codes: Tensor) -> Tensor:
        """uint8 bit patterns -> fp32 values; E4M3's 0x7F and E5M2's 0x7D..0x7F are NaN."""
        return _lookup(self, codes)

    def table(self) -> list[float]:
        """The value of every bit pattern; above `maximum` Inf (E5M2) or NaN."""
        half = []
        for code in range(2 ** (self.bits - 1)):
            exponent, mantissa = code >> self.mantissa_bits, code % 2**self.mantissa_bits
            fraction = mantissa * 2.0**-self.mantissa_bits
            if exponent == 0:
                value = fraction * 2.0**self.minimum_exponent
            else:
                value = (1.0 + fraction) * 2.0 ** (exponent - self.bias)
            if value > self.maximum:  # only E5M2 has an infinity
                value = math.inf if self.exponent_bits == 5 and mantissa == 0 else math.nan
            half.append(value)
        return half + [-value for value in half]


Element = IntegerElement | FloatElement


@cache
def _table(element: Element, device: torch.device) -> Tensor:
    import torch

    with torch.inference_mode(False):  # the table may later be used with autograd
        return torch.tensor(element.table(), dtype=torch.float32, device=device)


def _lookup(element: Element, codes: Tensor) -> Tensor:
    import torch

    flat = codes.reshape(-1).to(torch.int32)
    return unless_traced(_table)(element, codes.device).index_select(0, flat).view(codes.shape)
