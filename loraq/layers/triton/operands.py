"""Operands as the kernels read them, and how two of them are multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor
from loraq.formats.packing import unpack
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.formats.scales import nvfp4_tensor_scale
from loraq.layers.triton.numbers import Element, element_constants

WHOLE = 1 << 20  # a block that no axis exceeds: one scale for all of it
# Triton's interpreter does not multiply bf16; what bf16 holds exactly, fp32 holds as well.
INTERPRETED = triton.knobs.runtime.interpret
DECODED = tl.float32 if INTERPRETED else tl.bfloat16


class Unsupported(LoraqError):
    """No kernel computes this layer; emulation does."""


@dataclass(frozen=True)
class Operand:
    """[rows, K] as the kernels read it; element None: 16-bit values."""

    codes: Tensor
    scale: Tensor
    above: float | Tensor  # fp32 scale above the blocks': of the whole tensor, or one a row
    element: Element | None
    block: int
    width: int

    @property
    def above_each(self) -> bool:
        """Whether every row has its own scale above the blocks'."""
        return isinstance(self.above, Tensor)

    @property
    def above_pointer(self) -> Tensor:
        """Where kernels read those; any tensor where there are none."""
        return self.above if isinstance(self.above, Tensor) else self.scale

    @property
    def strides(self) -> tuple[int, int]:
        return self.codes.stride(0), self.scale.stride(0) if self.scale.dim() > 1 else 0


@dataclass(frozen=True)
class Product:
    """How two operands are multiplied: MODE, columns a step, and the type of decoded values."""

    mode: str
    step: int
    type: Any


def block_of(fmt: Format) -> int:
    return WHOLE if fmt.block is None or fmt.block == -1 else fmt.block


def stored_operand(packed: QuantizedTensor, device: torch.device) -> Operand:
    """A packed tensor, as it is stored; 6-bit codes get a byte each."""
    fmt, width, codes = packed.format, packed.shape[-1], packed.codes.to(device)
    if fmt.family == "float":
        return Operand(codes, codes, 1.0, None, WHOLE, width)
    if fmt.bits == 6:
        codes = unpack(codes, 6, width).contiguous()
    above = 1.0 if packed.tensor_scale is None else float(packed.tensor_scale)
    assert packed.scale is not None
    scale = packed.scale.to(device)
    return Operand(codes, scale, above, element_constants(fmt), block_of(fmt), width)


def product_of(a: Format, b: Format, device: torch.device) -> Product:
    """The way to multiply values of two formats; Unsupported where none is exact."""
    families = {a.family, b.family}
    block = min(block_of(a), block_of(b))
    if families <= {"int", "uint"}:
        step = min(block, 64)
        if step < 32 or any(block_of(f) % step for f in (a, b)):
            raise Unsupported(
                f"No kernel multiplies '{a.label}' with '{b.label}': their groups are to be "
                "powers of two from 32 on. Set compute=emulate."
            )
        return Product("int", step, None)
    scaled = all(f.bits in (4, 8) and f.block == 32 for f in (a, b))
    if families == {"mxfp"} and scaled and has_fp8(device):
        return Product("scaled", 64, None)
    if families == {"float"} and a.name == b.name:
        return Product("decode", 64, tl.float16 if a.name == "fp16" else DECODED)
    if all(f.scale in ("e8m0", "e4m3") or f.name == "bf16" for f in (a, b)):
        return Product("decode", 64, DECODED)
    raise Unsupported(
        f"No kernel multiplies '{a.label}' with '{b.label}' exactly. Set compute=emulate."
    )


def has_fp8(device: torch.device) -> bool:
    """Triton's `dot_scaled` goes through FP8 where the hardware has nothing better."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def room(x_TI: Tensor, fmt: Format) -> Operand:
    """Memory for the codes and scales of x̃, scales above the blocks' filled; or x̃ in 16 bits."""
    if fmt.family == "float":
        values = x_TI.to(FLOAT_DTYPES[fmt.name])
        return Operand(values, values, 1.0, None, WHOLE, x_TI.shape[1])
    above: float | Tensor = 1.0
    if fmt.tensor_scale == "token":
        above = nvfp4_tensor_scale(x_TI.float().abs().amax(-1))
    return empty_operand(*x_TI.shape, fmt, x_TI.device, above)


def empty_operand(
    rows: int, width: int, fmt: Format, device: torch.device, above: float | Tensor = 1.0
) -> Operand:
    """Memory for codes and scales of a block format."""
    element, block = element_constants(fmt), block_of(fmt)
    columns = (width + 1) // 2 if element.bits == 4 else width
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    dtype = FLOAT_DTYPES.get(fmt.scale, torch.uint8)
    scale = torch.empty(rows, -(-width // min(block, width)), dtype=dtype, device=device)
    return Operand(codes, scale, above, element, block, width)
