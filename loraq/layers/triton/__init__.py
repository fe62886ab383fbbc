"""Fast paths of the layer's equation on packed codes, in Triton (NVIDIA and AMD GPUs).

`prepare` makes a layer ready for them; `loraq/layers/backends.py` chooses.
"""

from loraq.layers.triton.layer import Prepared, prepare
from loraq.layers.triton.operands import Unsupported

__all__ = ["Prepared", "Unsupported", "prepare"]
