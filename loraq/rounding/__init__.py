"""How what is left of a weight is rounded to its format. One file a kind, looked up by name."""

from __future__ import annotations

import importlib

from torch import Tensor

from loraq.errors import unknown
from loraq.formats import Format, QuantizedTensor

KINDS = ("nearest",)


def round_weight(target_OI: Tensor, weight: Format, kind: str) -> QuantizedTensor:
    """Q(target) in packed form by the rounding named `kind`."""
    if kind not in KINDS:
        raise unknown("rounding", kind, KINDS)
    rounded: QuantizedTensor = importlib.import_module(f"loraq.rounding.{kind}").round_weight(
        target_OI, weight
    )
    return rounded
