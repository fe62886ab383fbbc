"""INT4 weights with scales of any float type, as other programs store them.

Letters: I in, O out, G groups of a row.
"""

from __future__ import annotations

from torch import Tensor

from loraq.formats import QuantizedTensor, get_format


def int4_weight(codes: Tensor, scale_OG: Tensor) -> QuantizedTensor:
    """Codes (O, I/2) with their scales, kept in their own type, which may be float32."""
    out, groups = scale_OG.shape
    width = 2 * codes.shape[1]
    fmt = get_format("int4", "channel" if groups == 1 else width // groups)
    return QuantizedTensor(codes, scale_OG, None, (out, width), fmt)
