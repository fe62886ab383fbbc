"""`statistics=weights` on the embedded model: without data, smoothing and GPTQ still help."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraq import recipe
from loraq.errors import LoraqError
from loraq.models.family import find_family
from loraq.models.known_inputs import known_inputs
from loraq.models.layers import list_layers
from loraq.models.moments import Moment
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import InputCapture
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from tests import pipelines
from tests.embedded import Embedded
from tests.quantization.test_quantize import Untouchable
from tests.quantization.toy import Toy, toy_layers

WEIGHTS = "quant.statistics=weights"
ROTATED = "quant.transform.hadamard=64"


def error(embedded: Embedded, method: str, *overrides: str) -> float:
    """Mean output error on the 16-bit model's own activations, which the recipe does not read."""
    layers = embedded.of_roles("self_q", "self_k", "self_v", "ff_up")  # they read modulated norms
    untouchable = Activations(Untouchable(), Untouchable(), Untouchable())
    chosen, family = recipe(method, *overrides), embedded.family
    assert not chosen.needs_calibration
    quantised = quantize_model(
        embedded.transformer, layers, chosen, untouchable, progress=None, family=family
    )
    rows = layer_errors(quantised, embedded.transformer, layers, embedded.inputs)
    return sum(row["output_error"] for row in rows) / len(rows)


def test_statistics_of_the_weights_lower_the_output_error(embedded):
    plain = error(embedded, "rtn", ROTATED)
    balanced = error(embedded, "rtn", ROTATED, "quant.transform.smooth=balanced", WEIGHTS)
    gptq = error(embedded, "gptq", ROTATED, "quant.transform.smooth=balanced", WEIGHTS)
    assert gptq < 0.98 * balanced < 0.95 * plain


def test_layers_without_known_statistics_are_quantised_without(embedded):
    transformer, layers, family = (
        embedded.transformer,
        embedded.of_roles("ff_down"),
        embedded.family,
    )
    asked = recipe("gptq", ROTATED, "quant.transform.smooth=balanced", WEIGHTS)
    plain = recipe("rtn", ROTATED)
    first, second = (
        quantize_model(transformer, layers, one, progress=None, family=family).layers
        for one in (asked, plain)
    )
    for name, tensors in first.items():
        assert torch.equal(tensors.weight.codes, second[name].weight.codes)
        assert tensors.transform.smooth_I is None


@pytest.mark.parametrize("name", ["flux", "wan", "stable_audio"])
def test_they_help_on_transformers_without_a_family_file(name):
    """Rotated layers behind normalisations, on inputs that the recipe does not read."""
    pipe, little = pipelines.build(name), pipelines.settings(name)
    network = pipe.transformer
    known = known_inputs(network, find_family("generic"))
    layers = [layer for layer in list_layers(network, "generic") if layer.shares_input in known]
    capture = InputCapture(network, layers, rows=256, forwards=8, seed=0)
    pipe.set_progress_bar_config(disable=True)
    with capture:
        generator = torch.Generator().manual_seed(0)
        pipe("a red cat", num_inference_steps=4, generator=generator, **little.CALL)
    errors = []
    for chosen in (
        recipe("rtn", ROTATED),
        recipe("gptq", ROTATED, "quant.transform.smooth=balanced", WEIGHTS),
    ):
        quantised = quantize_model(network, layers, chosen, progress=None)
        rows = layer_errors(quantised, network, layers, capture.inputs())
        errors.append(sum(row["output_error"] for row in rows) / len(rows))
    assert errors[1] < 0.95 * errors[0]


def test_a_model_whose_weights_tell_nothing_is_refused_and_partly_told_is_said(caplog):
    asked = recipe("gptq", WEIGHTS)
    with pytest.raises(LoraqError, match=r"none of its layers' inputs.*statistics=activations"):
        quantize_model(Toy(), toy_layers(), asked, progress=None)
    network = pipelines.build("ltx").transformer
    layers = list_layers(network, "generic")[:8]
    with caplog.at_level("INFO", logger="loraq"):
        quantize_model(network, layers, asked, progress=None)
    assert "3 of 8 layers (cross_q, cross_out, ff_down)" in caplog.text


def test_product_keys_distinguish_the_two_sources():
    measured = recipe("gptq")
    assert measured.needs_moments
    known = replace(measured, statistics="weights")
    assert not known.needs_moments and known.identity() != measured.identity()
    assert "statistics" not in measured.identity()


def test_inputs_that_are_nearly_constant_can_be_rotated(embedded):
    """cross_out of a one-token text has a rank-1 moment: float32 gives squares just below 0."""
    layers = embedded.of_roles("cross_out")
    g = torch.Generator().manual_seed(0)
    moments = {}
    for layer in layers:
        mean_I = torch.randn(384, generator=g).mul_(5)
        moments[layer.shares_input] = Moment(torch.outer(mean_I, mean_I), mean_I)
    chosen = recipe("gptq", ROTATED)
    made = quantize_model(
        embedded.transformer, layers, chosen, Activations(moments=moments), progress=None
    )
    assert len(made.layers) == len(layers)
