"""Fast paths of the layer's equation on packed codes, in Triton (NVIDIA and AMD GPUs).

`prepare` makes a layer ready for them; `loraq/compute.py` chooses.
"""

from loraq.kernels.layer import Prepared, prepare
from loraq.kernels.operands import Unsupported

__all__ = ["Prepared", "Unsupported", "prepare"]
