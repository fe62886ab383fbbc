"""SANA: 1×1 convolutions are linears over channels; the flow runs on a random little pipeline."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from experiments.bench.make_fullsize import meta_model
from loraq import recipe
from loraq.layers.linear import QuantizedLinear
from loraq.models import list_layers
from loraq.models.families.sana import known_inputs
from loraq.quantization.calibration import InputCapture, MomentCapture
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from loraq.runner.experiment import run


@pytest.mark.parametrize(
    ("skip", "count", "weights"), [(None, 160, 1_354_752_000), ((), 200, 1_555_456_000)]
)
def test_the_published_model_has_the_published_layers(skip, count, weights):
    transformer = meta_model("sana_1_6b")
    assert sum(parameter.numel() for parameter in transformer.parameters()) == 1_604_462_752
    layers = list_layers(transformer, "sana", skip)
    assert len(layers) == count
    assert sum(o * i for o, i in (layer.shape for layer in layers)) == weights


@pytest.fixture
def sana_overrides(sana_folder: Path, overrides: list[str]) -> list[str]:
    call = "{use_resolution_binning:false,clean_caption:false,complex_human_instruction:null}"
    return [
        "model=tiny_sana",
        "model.hub_id=null",
        "model.dtype=float32",
        f"model.call={call}",
        f"model.path={sana_folder}",
        *overrides[1:],
    ]


RANK = "quant.branch.rank=4"


@pytest.mark.parametrize(
    "method", [("rtn",), ("svdquant", RANK), ("loraq_o2", RANK), ("gptq",)], ids=lambda m: m[0]
)
def test_a_method_goes_from_config_to_table(sana_overrides, method):
    outcome = run([f"method={method[0]}", *method[1:], *sana_overrides], progress=False)
    row = outcome.records[-1]
    roles = {entry["role"] for entry in row.layers}
    assert len(row.layers) == 16 and {"ff_up", "ff_down"} <= roles
    assert all(0 < entry["output_error"] < 1 for entry in row.layers)
    assert row.metrics["psnr"]["value"] > 5


@pytest.fixture(scope="module")
def transformer(sana_folder):
    from diffusers import SanaTransformer2DModel

    return SanaTransformer2DModel.from_pretrained(sana_folder / "transformer").eval()


def forward(transformer, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return transformer(
            torch.randn(3, 4, 8, 8, generator=g),
            encoder_hidden_states=torch.randn(3, 6, 32, generator=g),
            timestep=torch.tensor([10.0, 400.0, 900.0]),
            encoder_attention_mask=torch.ones(3, 6),
            return_dict=False,
        )[0]


def test_a_quantised_convolution_is_a_convolution_with_its_effective_weight(transformer):
    """With 16-bit activations the layer's equation is the convolution itself, bias included."""
    layers = list_layers(transformer, "sana")
    quantised = quantize_model(
        transformer, layers, recipe("rtn", "format@quant.activation=fp16"), progress=None
    )
    for name in ("conv_inverted", "conv_point"):
        name = f"transformer_blocks.0.ff.{name}"
        original, tensors = transformer.get_submodule(name), quantised.layers[name]
        x = torch.randn(2, original.in_channels, 5, 7, generator=torch.Generator().manual_seed(1))
        weight = tensors.effective_weight()[:, :, None, None]
        wanted = torch.nn.functional.conv2d(x.half().float(), weight, original.bias)
        found = QuantizedLinear(tensors, convolution=True)(x)
        assert torch.allclose(found, wanted, atol=1e-4)
    before = forward(transformer)
    quantised.apply(transformer)
    try:
        after = forward(transformer)
    finally:
        quantised.revert(transformer)
    assert 0 < (after - before).norm() / before.norm() < 0.5
    assert torch.equal(forward(transformer), before)


def test_captured_rows_are_pixels_by_channels(transformer):
    layers = list_layers(transformer, "sana", ())
    with (
        InputCapture(transformer, layers, 64, 1, 0) as rows,
        MomentCapture(transformer, layers) as m,
    ):
        forward(transformer)
    x = rows.inputs()["transformer_blocks.1.ff.down"].float()
    assert x.shape == (64, 100)
    held = m.moments()["transformer_blocks.1.ff.down"]
    assert held.second_II.shape == (100, 100)
    assert torch.allclose(x.square().mean(0), held.second_II.diagonal(), rtol=1, atol=0.3)
    chosen = recipe("rtn", "format@quant.activation=fp16", "format@quant.weight=fp16")
    exact = quantize_model(transformer, list_layers(transformer, "sana"), chosen, progress=None)
    errors = layer_errors(exact, transformer, list_layers(transformer, "sana"), rows.inputs())
    assert max(error["output_error"] for error in errors) < 2e-3


def test_gates_are_not_shifted_and_odd_widths_are_accounted(transformer):
    """conv_point reads a gated SiLU: nothing bounds it below, so `shift` must not touch it."""
    layers = list_layers(transformer, "sana")
    shifted = recipe("rtn", "quant.transform.shift=true")
    made = quantize_model(transformer, layers, shifted, progress=None)
    assert all(tensors.transform.shift == 0 for tensors in made.layers.values())
    assert all(tensors.activation.family == "int" for tensors in made.layers.values())
    down = made.layers["transformer_blocks.0.ff.conv_point"]
    assert down.weight.shape == (40, 100)
    assert down.weight.nbytes == 40 * (50 + 2 * 2)  # 100 codes of 4 bits, two groups' fp16 scales


def test_weights_tell_of_sanas_inputs_too(transformer):
    known = known_inputs(transformer)
    assert len(known) == 3 * 2
    layers = [layer for layer in list_layers(transformer, "sana", ()) if layer.role == "self_q"]
    with MomentCapture(transformer, layers) as capture:
        forward(transformer)
    for name, moment in capture.moments().items():
        pair = torch.stack([known[name].second_II.diagonal(), moment.second_II.diagonal()]).log()
        assert torch.corrcoef(pair)[0, 1] > 0.5
    balanced = recipe("gptq", "quant.transform.smooth=balanced", "quant.statistics=weights")
    made = quantize_model(
        transformer, list_layers(transformer, "sana"), balanced, progress=None, family="sana"
    )
    smoothed = {n for n, t in made.layers.items() if t.transform.smooth_I is not None}
    assert len(smoothed) == 2 * 5  # q, k, v, out and conv_inverted of both blocks
    assert replace(balanced, statistics="activations").needs_moments
