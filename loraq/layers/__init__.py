"""One quantised layer: its equation, its packed tensors, its module and the compute back ends.

`equation.py` is the definition that the back ends must match. Imported by quantization and above;
imports transforms, formats and below.
"""

from loraq.layers.linear import QuantizedLinear
from loraq.layers.tensors import LayerTensors

__all__ = ["LayerTensors", "QuantizedLinear"]
