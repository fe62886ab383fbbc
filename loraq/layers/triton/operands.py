"""Operands as the kernels read them, and the product of two operands.

    mode     stored codes [rows, K]                      stored scales
    int      int8, one code per byte                     fp32 [blocks, rows]; activations: as stored
    scaled   as stored: E2M1 two per byte, 8-bit codes   E8M0 [rows, blocks]
    values   16-bit values, block scales applied         none

K is a multiple of the product's step: what is added is zero. Weights are brought into this form
once, when a layer is prepared; activations are written in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, dequantize
from loraq.formats.packing import unpack
from loraq.formats.quantization import FLOAT_DTYPES
from loraq.formats.scales import nvfp4_tensor_scale
from loraq.formats.triton.numbers import ElementConstants, element_constants
from loraq.layers.triton.products import FULL_AXIS as FULL_AXIS_CONSTANT

FULL_AXIS: int = FULL_AXIS_CONSTANT.value
INTERPRETED: bool = triton.knobs.runtime.interpret
# Triton's interpreter cannot multiply bf16; every bf16 value is exact in fp32.
DECODED = torch.float32 if INTERPRETED else torch.bfloat16

ProductMode = Literal["int", "scaled", "values"]


class Unsupported(LoraqError):
    """A layer without a kernel; set compute=emulate."""


@dataclass(frozen=True)
class Product:
    """How two operands are multiplied: mode, columns per step, and the dtype of stored codes."""

    mode: ProductMode
    step: int
    dtype: torch.dtype

    def padded(self, width: int) -> int:
        """K of operands of this width."""
        return triton.cdiv(width, self.step) * self.step

    def narrowed(self, width: int) -> Product:
        """The same product with a smaller step, if that suffices for operands of this width."""
        if self.mode == "scaled":
            return self
        return replace(self, step=min(self.step, max(32, triton.next_power_of_2(width))))


@dataclass(frozen=True)
class Operand:
    """A matrix [rows, K] in the layout of the kernels; element None: never quantised.

    tensor_scale: nvfp4's fp32 scale, a number per tensor or one value per row; None: 1.
    scale_strides: of the rows and of the blocks.
    """

    codes: Tensor
    scale: Tensor
    tensor_scale: float | Tensor | None
    element: ElementConstants | None
    block: int
    width: int
    scale_strides: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        if self.codes.stride(1) != 1:
            raise LoraqError(
                f"Codes with strides {self.codes.stride()} cannot be multiplied: kernels read "
                "adjacent columns. Call contiguous()."
            )

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
    def tensor_scale_value(self) -> float:
        """The scale of the tensor."""
        return self.tensor_scale if isinstance(self.tensor_scale, float) else 1.0

    @property
    def strides(self) -> tuple[int, int, int]:
        """Strides of the codes' rows, and of the scales' rows and blocks."""
        return self.codes.stride(0), *self.scale_strides


def block_size(fmt: Format) -> int:
    """Values per scale along a row."""
    return FULL_AXIS if fmt.block is None or fmt.block == -1 else fmt.block


def stored_operand(packed: QuantizedTensor, product: Product, device: torch.device) -> Operand:
    """The operand of a packed tensor, for one product."""
    packed = packed.to(device)
    fmt, (rows, width) = packed.format, packed.shape
    extra = product.padded(width) - width
    tensor_scale = None if packed.tensor_scale is None else float(packed.tensor_scale)
    if product.mode == "values":
        if packed.tensor_scale is not None:
            packed = replace(packed, tensor_scale=torch.ones_like(packed.tensor_scale))
        values = packed.codes if fmt.family == "float" else dequantize(packed)
        values = _with_columns(values.to(product.dtype), extra)
        return Operand(values, values, tensor_scale, None, FULL_AXIS, width)
    assert packed.scale is not None
    element, block = stored_element(fmt, product), block_size(fmt)
    if product.mode == "int":
        codes = fmt.element.decode(unpack(packed.codes, fmt.bits, width)).to(torch.int8)
        scale = packed.scale if packed.scale.dim() else packed.scale.expand(rows, 1)
        scale = scale.float().mT.contiguous()
        return Operand(_with_columns(codes, extra), scale, None, element, block, width, (1, rows))
    columns = product.padded(width) * fmt.bits // 8
    codes = _with_columns(packed.codes, columns - packed.codes.shape[1])
    scale = _with_columns(packed.scale, product.padded(width) // 32 - packed.scale.shape[1])
    return Operand(codes, scale, None, element, block, width, (scale.stride(0), 1))


def _with_columns(x: Tensor, extra: int) -> Tensor:
    """x and columns of zeros; x itself without them, which `pad` would copy."""
    return pad(x, (0, extra)) if extra else x


def stored_element(fmt: Format, product: Product) -> ElementConstants:
    """The constants of codes as they are stored; integers take a byte each, whatever their bits."""
    element = element_constants(fmt)
    return element._replace(bits=8) if product.mode == "int" else element


def choose_product(a: Format, b: Format, device: torch.device) -> Product:
    """The product for two formats; raises Unsupported if no product is exact."""
    families = {a.family, b.family}
    if families <= {"int", "uint"}:
        step = min(block_size(a), block_size(b), 128)
        if step < 32 or any(block_size(f) % step for f in (a, b)):
            raise Unsupported(
                f"No kernel multiplies '{a.label}' with '{b.label}': group sizes must be powers of "
                "two ≥ 32. Set compute=emulate."
            )
        return Product("int", step, torch.int8)
    scaled = all(f.bits in (4, 8) and f.block == 32 for f in (a, b))
    if families == {"mxfp"} and scaled and multiplies_mx(device):
        return Product("scaled", 128, torch.uint8)
    if families == {"float"} and a.name == b.name:
        return Product("values", 64, torch.float16 if a.name == "fp16" else DECODED)
    if all(f.scale in ("e8m0", "e4m3") or f.name == "bf16" for f in (a, b)):
        return Product("values", 64, DECODED)
    raise Unsupported(
        f"No kernel multiplies '{a.label}' with '{b.label}' exactly. Set compute=emulate."
    )


def multiplies_mx(device: torch.device) -> bool:
    """Whether the GPU's tensor cores apply E8M0 scales: NVIDIA from sm100 on, AMD's gfx95."""
    if device.type != "cuda":
        return True
    if torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (10, 0)
    return torch.cuda.get_device_properties(device).gcnArchName.startswith("gfx95")


def allocate_operand(x_TI: Tensor, fmt: Format, product: Product) -> Operand:
    """Empty codes and scales for x̃, with its tensor scales; for a 16-bit format, x̃ itself."""
    rows, width = x_TI.shape
    if fmt.family == "float":
        values = x_TI.to(FLOAT_DTYPES[fmt.name]).to(product.dtype)
        values = _with_columns(values, product.padded(width) - width)
        return Operand(values, values, None, None, FULL_AXIS, width)
    tensor_scale = None
    if fmt.tensor_scale == "token":
        tensor_scale = nvfp4_tensor_scale(x_TI.float().abs().amax(-1))
    return empty_operand(rows, width, fmt, product, x_TI.device, tensor_scale)


def empty_operand(
    rows: int,
    width: int,
    fmt: Format,
    product: Product,
    device: torch.device,
    tensor_scale: Tensor | None = None,
) -> Operand:
    """Codes and scales of a block format, to be written; what K adds to the width is zero."""
    element, block, columns = stored_element(fmt, product), block_size(fmt), product.padded(width)
    create = torch.empty if columns == width else torch.zeros
    if product.mode == "scaled":
        codes = create(rows, columns * fmt.bits // 8, dtype=product.dtype, device=device)
        scale = create(rows, columns // 32, dtype=torch.uint8, device=device)
    else:
        codes = create(rows, columns, dtype=product.dtype, device=device)
        blocks = 0 if product.mode == "values" else triton.cdiv(width, min(block, width))
        dtype = FLOAT_DTYPES.get(fmt.scale, torch.uint8)
        scale = torch.empty(rows, blocks, dtype=dtype, device=device)
    strides = scale.stride(0), 1
    return Operand(codes, scale, tensor_scale, element, block, width, strides)
