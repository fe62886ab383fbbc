"""Rounding of the main weight to its format: nearest or GPTQ, one module per kind.

Imported by quantization; imports config, formats and below.
"""

from __future__ import annotations

import importlib

from torch import Tensor

from loraq.config import RoundingConfig
from loraq.formats import Format, QuantizedTensor
from loraq.utils.user_module import running


def round_weights(
    target_BOI: Tensor, weight: Format, second_BII: Tensor | None, options: RoundingConfig
) -> list[QuantizedTensor]:
    """Q(target) of each unit in packed form, with the rounding `options.kind`.

    second_BII: second moments of the transformed inputs; GPTQ needs them.
    """
    with running(options.kind, "round_weights()"):
        module = importlib.import_module(f"loraq.rounding.{options.kind}")
        found: list[QuantizedTensor] = module.round_weights(target_BOI, weight, second_BII, options)
    return found
