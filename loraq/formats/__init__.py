"""Number formats: the table of formats, quantisation and dequantisation, packing of codes.

Functions on tensors. Imports `loraq.errors` and `loraq.utils` only; every other package may import
it. The table and `get_format` do not import torch; functions on tensors are imported at first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from loraq.formats.table import FORMATS, Format, get_format

if TYPE_CHECKING:
    from loraq.formats.operator import fake_quantize
    from loraq.formats.quantization import (
        QuantizedTensor,
        dequantize,
        quantize,
        stored_bits,
        stored_shapes,
    )

__all__ = [
    "FORMATS",
    "Format",
    "QuantizedTensor",
    "dequantize",
    "fake_quantize",
    "get_format",
    "quantize",
    "stored_bits",
    "stored_shapes",
]


def __getattr__(name: str) -> Any:
    """The names that need torch, imported at first use."""
    if name not in __all__:
        raise AttributeError(f"module 'loraq.formats' has no attribute '{name}'")
    module = "operator" if name == "fake_quantize" else "quantization"
    return getattr(importlib.import_module(f"loraq.formats.{module}"), name)
