"""Operands in the layout of the kernels, and the product of two operands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor
from loraq.formats.packing import unpack
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.formats.scales import nvfp4_tensor_scale
from loraq.layers.triton.numbers import ElementConstants, element_constants

FULL_AXIS = 1 << 20  # block size of one scale per row or per tensor; no axis is longer
# Triton's interpreter cannot multiply bf16; every bf16 value is exact in fp32.
INTERPRETED: bool = triton.knobs.runtime.interpret
DECODED = tl.float32 if INTERPRETED else tl.bfloat16

ProductMode = Literal["int", "scaled", "decode"]


class Unsupported(LoraqError):
    """A layer without a kernel; set compute=emulate."""


@dataclass(frozen=True)
class Operand:
    """A matrix [rows, K] in the layout of the kernels; element None: 16-bit values.

    tensor_scale: nvfp4's fp32 scale, a number per tensor or one value per row.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: float | Tensor
    element: ElementConstants | None
    block: int
    width: int

    def __repr__(self) -> str:
        bits = 16 if self.element is None else self.element.bits
        return f"Operand({len(self.codes)} × {self.width}, {bits} bits, block={self.block})"

    @property
    def tensor_scale_per_row(self) -> bool:
        """Whether every row has its own tensor scale."""
        return isinstance(self.tensor_scale, Tensor)

    @property
    def tensor_scale_pointer(self) -> Tensor:
        """The tensor scales per row; an unused tensor if there are none."""
        return self.tensor_scale if isinstance(self.tensor_scale, Tensor) else self.scale

    @property
    def strides(self) -> tuple[int, int]:
        """Row strides of the codes and of the scales."""
        return self.codes.stride(0), self.scale.stride(0) if self.scale.dim() > 1 else 0


@dataclass(frozen=True)
class Product:
    """How two operands are multiplied: mode, columns per step, and the dtype of decoded values."""

    mode: ProductMode
    step: int
    type: tl.dtype | None


def block_size(fmt: Format) -> int:
    """Values per scale along a row."""
    return FULL_AXIS if fmt.block is None or fmt.block == -1 else fmt.block


def stored_operand(packed: QuantizedTensor, device: torch.device) -> Operand:
    """The operand of a packed tensor; 6-bit codes are unpacked to one byte each."""
    fmt, width, codes = packed.format, packed.shape[-1], packed.codes.to(device)
    if fmt.family == "float":
        return Operand(codes, codes, 1.0, None, FULL_AXIS, width)
    if fmt.bits == 6:
        codes = unpack(codes, 6, width).contiguous()
    tensor_scale = 1.0 if packed.tensor_scale is None else float(packed.tensor_scale)
    assert packed.scale is not None
    scale = packed.scale.to(device)
    return Operand(codes, scale, tensor_scale, element_constants(fmt), block_size(fmt), width)


def choose_product(a: Format, b: Format, device: torch.device) -> Product:
    """The product for two formats; raises Unsupported if no product is exact."""
    families = {a.family, b.family}
    block = min(block_size(a), block_size(b))
    if families <= {"int", "uint"}:
        step = min(block, 64)
        if step < 32 or any(block_size(f) % step for f in (a, b)):
            raise Unsupported(
                f"No kernel multiplies '{a.label}' with '{b.label}': group sizes must be powers of "
                "two ≥ 32. Set compute=emulate."
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
    """Whether the GPU has FP8, which `tl.dot_scaled` uses on hardware without MX products."""
    if device.type != "cuda" or torch.version.hip is not None:
        return True
    return torch.cuda.get_device_capability(device) >= (8, 9)


def allocate_operand(x_TI: Tensor, fmt: Format) -> Operand:
    """Empty codes and scales for x̃, with its tensor scales; for a 16-bit format, x̃ itself."""
    if fmt.family == "float":
        values = x_TI.to(FLOAT_DTYPES[fmt.name])
        return Operand(values, values, 1.0, None, FULL_AXIS, x_TI.shape[1])
    tensor_scale: float | Tensor = 1.0
    if fmt.tensor_scale == "token":
        tensor_scale = nvfp4_tensor_scale(x_TI.float().abs().amax(-1))
    rows, width = x_TI.shape
    return empty_operand(rows, width, fmt, x_TI.device, tensor_scale)


def empty_operand(
    rows: int, width: int, fmt: Format, device: torch.device, tensor_scale: float | Tensor = 1.0
) -> Operand:
    """Empty codes and scales of a block format."""
    element, block = element_constants(fmt), block_size(fmt)
    columns = (width + 1) // 2 if element.bits == 4 else width
    codes = torch.empty(rows, columns, dtype=torch.uint8, device=device)
    dtype = FLOAT_DTYPES.get(fmt.scale, torch.uint8)
    scale = torch.empty(rows, -(-width // min(block, width)), dtype=dtype, device=device)
    return Operand(codes, scale, tensor_scale, element, block, width)
