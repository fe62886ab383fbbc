"""`statistics=weights` on the embedded model: without data, smoothing and GPTQ still help."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraq import recipe
from loraq.capture import Activations, InputCapture
from loraq.compose import load_rows
from loraq.models import list_layers, load_pipeline
from loraq.quantizer import layer_errors, quantize_model
from tests.quantize.test_quantize import Untouchable

WEIGHTS = "quant.statistics=weights"
ROTATED = "quant.transform.hadamard=64"


@pytest.fixture(scope="module")
def model():
    """The 16-bit transformer, the layers that read modulated norms, and rows of their inputs."""
    config = load_rows(["method=reference"])[0].model
    pipe = load_pipeline(config, "cpu")
    layers = list_layers(pipe.transformer, config.family, ())
    layers = [layer for layer in layers if layer.role in ("self_q", "self_k", "self_v", "ff_up")]
    with torch.inference_mode(), InputCapture(pipe.transformer, layers, 512, 4, 0) as capture:
        pipe(
            prompt=["lobster, animal marine", "kimono, clothing"],
            num_inference_steps=4,
            guidance_scale=config.guidance,
            height=128,
            width=128,
            max_sequence_length=16,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **config.call,
        )
    return pipe.transformer, layers, capture.inputs(), config.family


def error(model, method: str, *overrides: str) -> float:
    """Mean output error on the 16-bit model's own activations, which the recipe never sees."""
    transformer, layers, inputs, family = model
    untouchable = Activations(Untouchable(), Untouchable(), Untouchable())
    chosen = recipe(method, *overrides)
    assert not chosen.needs_calibration
    quantised = quantize_model(
        transformer, layers, chosen, untouchable, progress=None, family=family
    )
    rows = layer_errors(quantised, transformer, layers, inputs)
    return sum(row["output_error"] for row in rows) / len(rows)


def test_what_weights_tell_lowers_the_output_error(model):
    plain = error(model, "rtn", ROTATED)
    balanced = error(model, "rtn", ROTATED, "quant.transform.smooth=balanced", WEIGHTS)
    gptq = error(model, "gptq", ROTATED, "quant.transform.smooth=balanced", WEIGHTS)
    assert gptq < 0.98 * balanced < 0.95 * plain


def test_layers_of_which_weights_tell_nothing_do_without(model):
    transformer, _, _, family = model
    layers = [layer for layer in list_layers(transformer, family, ()) if layer.role == "ff_down"]
    asked = recipe("gptq", ROTATED, "quant.transform.smooth=balanced", WEIGHTS)
    plain = recipe("rtn", ROTATED)
    first, second = (
        quantize_model(transformer, layers, one, progress=None, family=family).layers
        for one in (asked, plain)
    )
    for name, tensors in first.items():
        assert torch.equal(tensors.weight.codes, second[name].weight.codes)
        assert tensors.transform.smooth_I is None


def test_product_keys_tell_the_two_sources_apart():
    measured = recipe("gptq")
    assert measured.needs_moments
    known = replace(measured, statistics="weights")
    assert not known.needs_moments and known.identity() != measured.identity()
    assert "statistics" not in measured.identity()
