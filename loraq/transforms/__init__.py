"""Exact re-parametrisations of a layer's input and weight: smoothing, block Hadamard, shift.

Imported by layers and above; imports `loraq.errors` and
`loraq.utils` only.
"""

from loraq.transforms.input_transform import GELU_SHIFT, InputTransform

__all__ = ["GELU_SHIFT", "InputTransform"]
