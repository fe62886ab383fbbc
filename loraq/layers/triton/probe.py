"""Kernels are compared with the emulated layer at the first layer of each kind on a device."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

import torch

from loraq.layers.tensors import LayerTensors
from loraq.layers.triton.operands import Unsupported
from loraq.layers.triton.support import Equation

if TYPE_CHECKING:
    from loraq.layers.backends import Compute

log = logging.getLogger(__name__)
TOKENS = 64
LIMIT = 0.05
"""Of the output's norm. Rounding makes less than 0.01; a wrongly read operand made 0.6 to 0.8."""
_agreeing: set[tuple[Equation, torch.dtype, torch.device]] = set()


def check_agreement(
    layer: Compute,
    emulation: Callable[[], Compute],
    tensors: LayerTensors,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Raise Unsupported, after a warning, if kernels compute something else than the emulation.

    Compares random tokens, once per process for layers of equal formats, width and rank.
    """
    kind = Equation.from_layer(tensors), dtype, device
    if kind in _agreeing or torch.compiler.is_compiling():
        return
    g = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, tensors.weight.shape[-1], generator=g).to(device, dtype)
    emulated = emulation()
    wanted = emulated.multiply(emulated.quantize(x)).float()
    try:
        found = layer.multiply(layer.quantize(x)).float()
    except Exception as error:  # whatever Triton's compiler or a driver raises on a new GPU
        _refuse(tensors, device, f"fail ({type(error).__name__}: {error})")
    distance = float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))
    if not distance < LIMIT:
        _refuse(
            tensors,
            device,
            f"differ from the emulation by {distance:.2g} of the output's norm (limit {LIMIT})",
        )
    _agreeing.add(kind)


def _refuse(tensors: LayerTensors, device: torch.device, reason: str) -> NoReturn:
    label, width = tensors.weight.format.label, tensors.weight.shape[-1]
    text = f"the kernels of {label} layers of width {width} on {device} {reason}"
    log.warning("%s; please report this.", text)
    raise Unsupported(f"compute=triton: {text}. Set compute=emulate.")
