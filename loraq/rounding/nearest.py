"""Rounding to nearest, ties to even, with the format's scales."""

from __future__ import annotations

from torch import Tensor

from loraq.config import RoundingConfig
from loraq.formats import Format, QuantizedTensor, quantize


def round_weights(
    target_BOI: Tensor, weight: Format, second_BII: Tensor | None, options: RoundingConfig
) -> list[QuantizedTensor]:
    """Q(target) of each unit in packed form."""
    return [quantize(target_OI, weight) for target_OI in target_BOI]
