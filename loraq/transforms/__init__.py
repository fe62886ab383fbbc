"""Exact re-parametrisations of a layer's input and weight, one file a kind.

Imported by layers, quantization and kernels; imports formats' level and below.
"""

from loraq.transforms.input_transform import GELU_SHIFT, InputTransform

__all__ = ["GELU_SHIFT", "InputTransform"]
