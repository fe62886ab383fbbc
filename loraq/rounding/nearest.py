"""Round to nearest, ties to even, each block by its own scale (clip search: the format's)."""

from __future__ import annotations

from torch import Tensor

from loraq.formats import Format, QuantizedTensor, quantize


def round_weight(target_OI: Tensor, weight: Format) -> QuantizedTensor:
    return quantize(target_OI, weight)
