"""How a packed layer computes: emulation, which is the definition, or kernels on the packed codes.

emulate   operands dequantised, products in x's type, float32 on a CPU: everywhere, every format
triton    codes through the GPU's low-bit units (`layers/triton/`); a layer that no kernel
          computes is an error
auto      triton on a GPU for every layer that it computes, emulation for the others; on a CPU that
          multiplies bfloat16 by itself, for a model in that type, emulation with such products:
          operands of MX and NVFP4 are exact in it, integers with 16-bit scales lose their last bits
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format
from loraq.layers.equation import QuantizedInput, matmul, multiply, quantize_input
from loraq.layers.tensors import LayerTensors
from loraq.utils import batch_invariance


class Compute(Protocol):
    """The equation in two halves: what q, k and v share, and the rest; x̃ is formed in `dtype`."""

    dtype: torch.dtype

    def quantize(self, x: Tensor) -> Any:
        """Of an already transformed x̃ [..., I]: what `multiply` takes."""

    def multiply(self, held: Any) -> Tensor:
        """y [..., O]."""


@torch.compiler.assume_constant_result
def _by_onednn(device: str) -> bool:
    """A compiler takes the answer as it is and does not trace the probes."""
    return batch_invariance.use_onednn(device)


@torch.compiler.assume_constant_result
def by_bfloat16_units(device: str, dtype: torch.dtype) -> bool:
    """A compiler takes this answer, too, as it is."""
    return batch_invariance.use_bfloat16(device, str(dtype).removeprefix("torch."))


class Emulated:
    """Dense copies of the operands in one type, on one device.

    On a CPU that is float32, whatever the model's type, unless `operands` says otherwise: few have
    16-bit units, and without them a product in bfloat16 is the slower one
    (experiments/bench/forward.py). x̃ is formed in float32 there in any case.
    """

    def __init__(
        self,
        tensors: LayerTensors,
        dtype: torch.dtype,
        device: torch.device,
        operands: torch.dtype | None = None,
    ) -> None:
        self.dtype = torch.float32 if device.type == "cpu" else dtype
        self.operands = dtype = operands or self.dtype
        dense = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value
            for name, value in tensors.dense().items()
        }
        self.weight_OI, self.left_OR = dense.pop("weight_OI"), dense.pop("left_OR")
        self.bias_O = None if tensors.bias_O is None else tensors.bias_O.to(device, dtype)
        use_onednn = dtype == torch.float32 and _by_onednn(device.type)
        self.product = batch_invariance.onednn_product if use_onednn else matmul
        self.input = dense | {"product": self.product}

    def quantize(self, x: Tensor) -> QuantizedInput:
        return quantize_input(x, self.operands, **self.input)

    def multiply(self, held: QuantizedInput) -> Tensor:
        return multiply(held, self.weight_OI, self.left_OR, self.bias_O, self.product)


def check_compute(
    formats: Mapping[str, Format],
    requantize: bool,
    rank: int,
    widths: Iterable[int],
    device: torch.device,
) -> None:
    """LoraqError where kernels are missing for layers yet to be packed with a recipe's formats."""
    try:
        from loraq.layers.triton.support import check, equations
    except ImportError as error:
        raise _no_triton(error) from None
    for equation in equations(formats, requantize, rank, widths):
        check(equation, device)


def _no_triton(error: ImportError) -> LoraqError:
    return LoraqError(
        f"compute=triton needs the package triton, which does not import here ({error}). "
        "Install it, or set compute=emulate."
    )


def make_compute(
    mode: str, tensors: LayerTensors, dtype: torch.dtype, device: torch.device
) -> Compute:
    """LoraqError where `triton` is asked for and cannot be had."""
    if mode == "auto" and by_bfloat16_units(device.type, dtype):
        return Emulated(tensors, dtype, device, operands=torch.bfloat16)
    if mode == "emulate" or (mode == "auto" and device.type != "cuda"):
        return Emulated(tensors, dtype, device)
    try:
        from loraq.layers.triton import Unsupported, prepare
    except ImportError as error:  # PyTorch brings Triton along on Linux alone
        if mode == "auto":
            return Emulated(tensors, dtype, device)
        raise _no_triton(error) from None
    try:
        return prepare(tensors, dtype, device)
    except Unsupported:
        if mode == "triton":
            raise
        return Emulated(tensors, dtype, device)
