"""A rounding of one's own reaches the packed layers, also without calibration."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

import loraq
from loraq.config import RoundingConfig, validation
from loraq.errors import LoraqError
from loraq.formats import dequantize, get_format, quantize
from loraq.models.layers import list_layers
from loraq.quantization.quantizer import quantize_model
from loraq.rounding import round_weights
from tests.little import little_pixart


def test_a_rounding_of_ones_own_rounds_data_free_weights(monkeypatch):
    own = ModuleType("loraq.rounding.doubled")
    own.round_weights = lambda target, fmt, second, options: [quantize(2 * w, fmt) for w in target]
    monkeypatch.setitem(sys.modules, own.__name__, own)
    monkeypatch.setattr(validation, "modules_defining", lambda package, function: ("doubled",))
    recipe = loraq.recipe("rtn")
    transformer = little_pixart().transformer
    layers = list_layers(transformer, "pixart_sigma")[:1]
    name = layers[0].name

    def weight(recipe):
        model = quantize_model(transformer, layers, recipe, family="pixart_sigma")
        return dequantize(model.layers[name].weight)

    doubled = weight(replace(recipe, rounding=RoundingConfig(kind="doubled")))
    assert torch.equal(doubled, 2 * weight(recipe))


def test_a_rounding_that_exits_names_itself(monkeypatch):
    own = ModuleType("loraq.rounding.leaving")
    own.round_weights = lambda *_: sys.exit(0)
    monkeypatch.setitem(sys.modules, own.__name__, own)
    monkeypatch.setattr(validation, "modules_defining", lambda package, function: ("leaving",))
    with pytest.raises(LoraqError, match=r"'leaving': round_weights\(\) raised SystemExit"):
        round_weights(torch.ones(1, 2, 2), get_format("int4"), None, RoundingConfig("leaving"))
