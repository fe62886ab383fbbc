"""Triton kernels for the layer's equation on packed codes (NVIDIA and AMD GPUs).

Imported by `loraq/layers/backends.py` only, at first use, because the package triton is not
available everywhere; imports formats, transforms and the modules of `layers`.
"""

from loraq.layers.triton.layer import PreparedLayer, is_faster, prepare
from loraq.layers.triton.operands import Unsupported

__all__ = ["PreparedLayer", "Unsupported", "is_faster", "prepare"]
