"""How what is left of a weight is rounded to its format. One file a kind, looked up by name."""

from __future__ import annotations

import importlib

from torch import Tensor

from loraq.config import RoundingConfig
from loraq.formats import Format, QuantizedTensor


def round_weights(
    target_BOI: Tensor, weight: Format, second_BII: Tensor | None, options: RoundingConfig
) -> list[QuantizedTensor]:
    """Q(target) of each unit in packed form, by the rounding that `options` name.

    second_BII: the inputs' second moments in the basis of `target_BOI`, for roundings that read it.
    """
    module = importlib.import_module(f"loraq.rounding.{options.kind}")
    rounded: list[QuantizedTensor] = module.round_weights(target_BOI, weight, second_BII, options)
    return rounded
