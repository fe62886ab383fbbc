"""LoRaQ among diffusers' own quantisers: packed checkpoints by save_pretrained, from_pretrained.

    import loraq.diffusers_quantizer
    pipe = PixArtSigmaPipeline.from_pretrained(folder)                      # saved quantised
    net = PixArtTransformer2DModel.from_pretrained(
        folder_16_bit, quantization_config=LoRaQConfig("loraq_best"))       # quantised on the way

Importing this module adds two entries to diffusers' mappings and changes nothing else there.
`QuantizedModel.apply` does so too, because a quantised model must know how it is saved.
"""

from __future__ import annotations

import functools
from typing import Any

from diffusers.quantizers import auto
from diffusers.utils import logging
from torch import nn

from loraq.compose import recipe
from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.models.layers import family_of, list_layers, with_default_skip
from loraq.quantization.diffusers_config import NAME, PackedConfig
from loraq.quantization.diffusers_packed import (
    PackedQuantizer,
    attach,
    forget,
    held_layers,
)
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_model


class LoRaQConfig(PackedConfig):
    """What to quantise with while 16-bit weights are loaded, or how a saved model was packed."""

    def recipe_asked(self) -> Recipe:
        """The recipe of `method`; LoraqError where there is none, or it reads activations."""
        if self.method is None:
            raise LoraqError(
                "LoRaQConfig() names no method for quantising 16-bit weights, and no packed "
                "layers. Give a method: LoRaQConfig('loraq_best'), or LoRaQConfig('loraq_o2', "
                "'quant.branch.rank=16'); or restore the checkpoint's config.json."
            )
        chosen = recipe(self.method, *self.overrides)
        if chosen.needs_calibration:
            raise LoraqError(
                f"method {self.method} reads activations, and there are none while weights are "
                "loaded. Load the 16-bit pipeline and use loraq.quantize(pipe, …, prompts=[…]), or "
                "take a data-free method such as loraq_best."
            )
        return chosen


class LoRaQQuantizer(PackedQuantizer):
    """Loads packed layers, or quantises 16-bit ones once they are loaded."""

    quantization_config: LoRaQConfig

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        if not self.pre_quantized:
            _ = self._recipe  # refused before any weight is read

    @functools.cached_property
    def _recipe(self) -> Recipe:
        return self.quantization_config.recipe_asked()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            super()._process_model_before_weight_loading(model, **kwargs)
        else:
            list_layers(model, family_of(model), self._recipe.skip)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        if not self.pre_quantized:
            return missing_keys
        return super().update_missing_keys(model, missing_keys, prefix)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            return super()._process_model_after_weight_loading(model, **kwargs)
        family = family_of(model)
        chosen = with_default_skip(self._recipe, family)
        layers = list_layers(model, family, chosen.skip)
        bar = "quantise" if logging.is_progress_bar_enabled() else None
        quantize_model(model, layers, chosen, progress=bar, family=family).apply(model)
        self.quantization_config = model.config.quantization_config
        self.pre_quantized = True
        return model


def packed_layers(transformer: Any) -> QuantizedModel:
    """The packed layers that `transformer` computes with, for their accounting."""
    quantizer = getattr(transformer, "hf_quantizer", None)
    if not isinstance(quantizer, PackedQuantizer):
        raise LoraqError(f"{type(transformer).__name__} has no packed layers of ours.")
    return QuantizedModel(held_layers(transformer, quantizer.quantization_config.entries()))


__all__ = ["LoRaQConfig", "LoRaQQuantizer", "attach", "forget", "packed_layers"]

auto.AUTO_QUANTIZER_MAPPING[NAME] = LoRaQQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = LoRaQConfig
