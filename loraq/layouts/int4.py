"""INT4 weights with scales of any float type, as other programs store them.

Letters: I in, O out, G groups of a row.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from loraq.formats import QuantizedTensor, get_format
from loraq.formats.packing import unpack
from loraq.layouts.engine_layer import SCALE_NAMES


def int4_weight(codes: Tensor, scale_OG: Tensor) -> QuantizedTensor | Tensor:
    """Codes (O, I/2) with their scales: packed if a 16-bit type holds these, else values (O, I)."""
    out, groups = scale_OG.shape
    width = 2 * codes.shape[1]
    fmt = get_format("int4", "channel" if groups == 1 else width // groups)
    for dtype, name in SCALE_NAMES.items():
        held = scale_OG.to(dtype)
        if held.float().equal(scale_OG.float()):
            return QuantizedTensor(codes, held, None, (out, width), replace(fmt, scale=name))
    values = fmt.element.decode(unpack(codes, 4, width))
    return (values.unflatten(-1, (groups, -1)) * scale_OG.float()[..., None]).flatten(-2)
