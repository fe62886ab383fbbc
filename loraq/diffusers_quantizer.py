"""LoRaQ as a diffusers quantizer: packed checkpoints with save_pretrained and from_pretrained.

    import loraq.diffusers_quantizer
    pipe = PixArtSigmaPipeline.from_pretrained(folder)                      # a packed checkpoint
    net = PixArtTransformer2DModel.from_pretrained(
        folder_16_bit, quantization_config=LoRaQConfig("loraq_best"))       # quantised on loading

Importing this module adds two entries to diffusers' mappings and changes nothing else there.
`QuantizedModel.apply` adds them too, so that a quantised model can be saved.
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
from loraq.layers.tensors import LayerTensors
from loraq.models.adapters import adapter_bytes
from loraq.models.denoisers import dtype_of, joined, parts
from loraq.models.family import recipe_for
from loraq.models.finite import check_finite
from loraq.models.layers import family_of, list_layers
from loraq.quantization.diffusers_config import QUANT_METHOD, PackedConfig
from loraq.quantization.diffusers_packed import (
    PackedQuantizer,
    attach,
    forget,
    held_layers,
    refuse_missing,
)
from loraq.quantization.made_from import network_of
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_model


class LoRaQConfig(PackedConfig):
    """The method to quantise with on loading, or the layout of a saved packed model.

    `LoRaQConfig("loraq_o2", "quant.branch.rank=16")`: a preset and overrides, data-free ones only.
    """

    def requested_recipe(self) -> Recipe:
        """The recipe of `method`; LoraqError without a method, or if it reads activations."""
        if self.method is None:
            raise LoraqError(
                "LoRaQConfig() names no method for quantising 16-bit weights, and no packed "
                "layers. Pass a method: LoRaQConfig('loraq_best'), or LoRaQConfig('loraq_o2', "
                "'quant.branch.rank=16'); or restore the checkpoint's config.json."
            )
        chosen = recipe(self.method, *self.overrides)
        if chosen.needs_calibration:
            raise LoraqError(
                f"method {self.method} reads activations, which are not available on loading. Load "
                "the 16-bit pipeline and use loraq.quantize(pipe, …, prompts=[…]), or use a "
                "data-free method such as loraq_best."
            )
        return chosen


class LoRaQQuantizer(PackedQuantizer):
    """Load packed layers, or load 16-bit layers and quantise them."""

    quantization_config: LoRaQConfig
    pre_quantized: bool

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        super().validate_environment(*args, device_map=device_map, **kwargs)
        if not self.pre_quantized:
            _ = self._recipe  # raises before any weight is read

    @functools.cached_property
    def _recipe(self) -> Recipe:
        return self.quantization_config.requested_recipe()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if self.pre_quantized:
            super()._process_model_before_weight_loading(model, **kwargs)
        else:
            list_layers(model, family_of(model), self._recipe.skip)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        if not self.pre_quantized:
            refuse_missing(sorted(missing_keys))
            return missing_keys
        return super().update_missing_keys(model, missing_keys, prefix)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            return super()._process_model_after_weight_loading(model, **kwargs)
        check_finite(model, type(model).__name__)
        family = family_of(model)
        chosen = recipe_for(self._recipe, family, dtype_of(model))
        layers = list_layers(model, family, chosen.skip)
        bar = "quantise" if logging.is_progress_bar_enabled() else None
        quantized = quantize_model(model, layers, chosen, progress=bar, family=family)
        quantized.apply(model)
        quantized.check_called(model)
        self.quantization_config = model.config.quantization_config
        self.pre_quantized = True
        return model


def packed_layers(transformer: Any) -> QuantizedModel:
    """The packed layers of a loaded `transformer` or pipeline, for their memory and errors.

    Raises LoraqError if a transformer has no LoRaQ layers.
    """
    found: dict[str, LayerTensors] = {}
    for part, network in parts(network_of(transformer)).items():
        quantizer = getattr(network, "hf_quantizer", None)
        if not isinstance(quantizer, PackedQuantizer):
            raise LoraqError(
                f"{type(network).__name__} has no packed LoRaQ layers. Load a packed checkpoint or "
                "quantise the model with loraq.quantize."
            )
        held = held_layers(network, quantizer.quantization_config.layer_entries())
        found |= {joined(part, name): tensors for name, tensors in held.items()}
    return QuantizedModel(found, adapters=adapter_bytes(network_of(transformer)))


__all__ = ["LoRaQConfig", "LoRaQQuantizer", "attach", "forget", "packed_layers"]

auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = LoRaQQuantizer
auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = LoRaQConfig
