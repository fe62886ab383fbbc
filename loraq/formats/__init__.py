"""What a number can be: one table of formats, quantise and dequantise, packing.

Pure functions on tensors; this package imports torch and `loraq.errors` alone.
"""

from loraq.formats.fake import fake_quantize
from loraq.formats.quantize import (
    QuantizedTensor,
    dequantize,
    quantize,
    stored_bits,
    stored_shapes,
)
from loraq.formats.table import FORMATS, Format, get_format

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
