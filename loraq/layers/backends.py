"""Compute modes of a packed layer: emulation, which is the definition, or Triton kernels.

emulate   dequantised operands, products in x's dtype, on a CPU in float32; every device and format
triton    kernels on the packed codes (`layers/triton/`); a layer without a kernel is an error
auto      on a GPU, triton for every layer that has a kernel which the cost table calls faster
          (`layers/kernel_costs.py`), and emulation for the others; on a CPU, emulation, with
          bfloat16 products if the model has that dtype and the processor has native bfloat16
          products: MX and NVFP4 operands are exact in it, integers with 16-bit scales lose their
          last bits
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn.functional import linear

from loraq.errors import LoraqError
from loraq.formats import Format
from loraq.layers.equation import (
    QuantizedInput,
    matmul,
    multiply,
    onednn_product,
    quantize_input,
)
from loraq.layers.stacked import quantize_stacked, stack
from loraq.layers.tensors import LayerTensors
from loraq.transforms.input_transform import InputTransform
from loraq.utils import batch_invariance

ComputeMode = Literal["emulate", "auto", "triton"]
COMPUTE_MODES: tuple[ComputeMode, ...] = get_args(ComputeMode)


IDENTITY = InputTransform()


class Compute(Protocol):
    """The equation in two steps, so that q, k and v can share the first.

    dtype: of the transformed input x̃.
    """

    @property
    def dtype(self) -> torch.dtype: ...

    def quantize(self, x: Tensor) -> Any:
        """Quantise a transformed x̃ [..., I]; the result is the argument of `multiply`."""

    def multiply(self, quantized: Any) -> Tensor:
        """y [..., O]."""


@torch.compiler.assume_constant_result
def _use_onednn(device: str) -> bool:
    """Constant under torch.compile, so that the probe is not traced."""
    return batch_invariance.use_onednn(device)


@torch.compiler.assume_constant_result
def _use_bfloat16(device: str, dtype: torch.dtype) -> bool:
    """Constant under torch.compile, so that the probe is not traced."""
    return batch_invariance.use_bfloat16(device, str(dtype).removeprefix("torch."))


class Emulated:
    """The equation on dequantised operands, on one device.

    operands: their dtype. Default on a CPU: float32 for a model of any dtype, because bfloat16
        products are slower on processors without native support (experiments/bench/forward.py).
    x̃ is computed in float32 on a CPU, otherwise in `dtype`. 16-bit operands on a GPU are multiplied
    stacked (`stacked.py`).
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
        arguments = {
            name: value.to(device, dtype) if isinstance(value, Tensor) else value
            for name, value in tensors.equation_arguments().items()
        }
        self.weight_OI, self.left_OR = arguments.pop("weight_OI"), arguments.pop("left_OR")
        self.stacked = device.type == "cuda" and dtype.itemsize == 2
        if self.stacked:
            self.weight_OI, self.left_OR = stack(self.weight_OI, self.left_OR), None
        self.bias_O = None if tensors.bias_O is None else tensors.bias_O.to(device, dtype)
        use_onednn = dtype == torch.float32 and _use_onednn(device.type)
        self.product = onednn_product if use_onednn else matmul
        self.input_arguments = arguments

    def quantize(self, x: Tensor, transform: InputTransform = IDENTITY) -> QuantizedInput:
        """Qa(x̃) and the branch's intermediate, from x̃ or from x and its transform."""
        if self.stacked:
            x = x if transform.identity else x.to(self.dtype)
            return quantize_stacked(x, transform, self.operands, **self.input_arguments)
        if not transform.identity:
            x = transform.input(x.to(self.dtype))
        return quantize_input(x, self.operands, **self.input_arguments, product=self.product)

    def multiply(self, quantized: QuantizedInput) -> Tensor:
        """y [..., O]."""
        if self.stacked:
            return linear(quantized.main, self.weight_OI, self.bias_O)
        return multiply(quantized, self.weight_OI, self.left_OR, self.bias_O, self.product)


def check_compute(
    formats: Mapping[str, Format],
    requantize: bool,
    rank: int,
    widths: Iterable[int],
    device: torch.device,
) -> None:
    """Raise LoraqError if layers of a recipe with these formats and input widths have no kernel."""
    try:  # the package triton is available on Linux only
        from loraq.layers.triton.support import check_supported, recipe_equations
    except ImportError as error:
        raise _triton_missing(error) from None
    for equation in recipe_equations(formats, requantize, rank, widths):
        check_supported(equation, device)


def _triton_missing(error: ImportError) -> LoraqError:
    return LoraqError(
        f"compute=triton needs the package triton, which cannot be imported ({error}). "
        "Install it, or set compute=emulate."
    )


def make_compute(
    mode: ComputeMode, tensors: LayerTensors, dtype: torch.dtype, device: torch.device
) -> Compute:
    """The back end of a layer for inputs of `dtype` on `device`.

    Raises LoraqError for mode=triton without a GPU, the package triton or a kernel for the layer,
    and if the kernels compute something else than the emulation (`triton/probe.py`).
    """
    if mode == "auto" and _use_bfloat16(device.type, dtype):
        return Emulated(tensors, dtype, device, operands=torch.bfloat16)
    if mode == "emulate" or (mode == "auto" and device.type != "cuda"):
        return Emulated(tensors, dtype, device)
    try:  # the package triton is available on Linux only
        from loraq.layers.triton import Unsupported, is_faster, prepare
        from loraq.layers.triton.probe import check_agreement
    except ImportError as error:
        if mode == "auto":
            return Emulated(tensors, dtype, device)
        raise _triton_missing(error) from None
    try:
        if mode == "auto" and not is_faster(tensors, device):
            return Emulated(tensors, dtype, device)
        layer = prepare(tensors, dtype, device)
        emulated = partial(Emulated, tensors, dtype, device)
        check_agreement(layer, emulated, tensors, dtype, device)
        return layer
    except Unsupported:
        if mode == "triton":
            raise
        return Emulated(tensors, dtype, device)
