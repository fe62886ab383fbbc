"""One quantised layer: its equation, its packed tensors, the module, and what computes it.

The equation (`equation.py`) is the definition; back ends must agree with it. Imported by
quantization and above; imports transforms, formats and below.
"""

from loraq.layers.linear import QuantizedLinear
from loraq.layers.tensors import LayerTensors

__all__ = ["LayerTensors", "QuantizedLinear"]
