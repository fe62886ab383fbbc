"""A pipeline with two experts (Wan 2.2) is quantised, saved and loaded as one model."""

from __future__ import annotations

import pytest
import torch
from diffusers import WanPipeline

import loraq
from loraq.compose import load_rows, recipe
from loraq.data import Prompt
from loraq.diffusers_quantizer import packed_layers
from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.models import list_layers, load_pipeline
from loraq.models.denoisers import Experts, denoiser_of
from loraq.models.mapped import mapped_transformer, remap, runs_as_stored
from loraq.quantization.grouping import make_units
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from loraq.runner.sensitivity import measure_sensitivity
from loraq.runner.trajectories import output_errors, record_forwards
from tests import pipelines

PROMPT = ["a red cat"]


def test_both_experts_are_quantised_saved_and_loaded(tmp_path):
    pipe = pipelines.build("wan")
    plain = pipelines.generate(pipe, "wan", PROMPT)
    model = loraq.quantize(pipe, "rtn", progress=False)
    of_both = {name.partition(".")[0] for name in model.layers}
    assert of_both == {"transformer", "transformer_2"}
    for part in of_both:
        packed = [
            name
            for name, module in getattr(pipe, part).named_modules()
            if isinstance(module, QuantizedLinear)
        ]
        assert sorted(f"{part}.{name}" for name in packed) == sorted(
            name for name in model.layers if name.startswith(f"{part}.")
        )
    made = pipelines.generate(pipe, "wan", PROMPT)
    assert not torch.equal(made, plain)

    pipe.save_pretrained(tmp_path / "packed", safe_serialization=True)
    loaded = WanPipeline.from_pretrained(tmp_path / "packed")
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pipelines.generate(loaded, "wan", PROMPT), made)
    kept = packed_layers(loaded)
    assert kept.layers.keys() == model.layers.keys()
    assert (kept.nbytes, kept.weights) == (model.nbytes, model.weights)

    with pytest.raises(LoraqError, match="applied to another Experts"):
        model.revert(loaded)
    model.revert(pipe)
    assert torch.equal(pipelines.generate(pipe, "wan", PROMPT), plain)
    with model.applied(denoiser_of(pipe)):  # another Experts over the same networks
        assert isinstance(denoiser_of(pipe), Experts)
        assert torch.equal(pipelines.generate(pipe, "wan", PROMPT), made)


def test_a_calibrated_recipe_reads_the_inputs_of_both_experts():
    pipe = pipelines.build("wan")
    file = pipelines.settings("wan")
    call = {**file.CALL, "num_inference_steps": file.STEPS}
    model = loraq.quantize(
        pipe, "svdquant", prompts=PROMPT, call=call, rows_per_layer=32, progress=False
    )
    assert {name.partition(".")[0] for name in model.layers} == {"transformer", "transformer_2"}
    assert all(tensors.left is not None for tensors in model.layers.values())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_mapped_experts_are_those_that_the_pipeline_loads(stored, tmp_path):
    """Norms and the timestep embedding of a bfloat16 pipeline stay in float32, as in diffusers."""
    pipe = pipelines.build("wan")
    for part in (pipe.transformer, pipe.transformer_2):
        torch.nn.Module.to(part, stored)
    pipe.save_pretrained(tmp_path / "wan", safe_serialization=True)
    rows = load_rows(["model=hub", f"model.path={tmp_path / 'wan'}", "method=rtn"])
    model = rows[-1].model
    assert runs_as_stored(model) == (stored == torch.bfloat16)
    mapped, loaded = mapped_transformer(model), denoiser_of(load_pipeline(model))
    own = mapped.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(own[name].to(tensor.dtype), tensor), name
        if runs_as_stored(model):
            assert own[name].dtype == tensor.dtype, name
    remap(mapped, model)
    name = "transformer_2.blocks.0.ffn.net.2.weight"
    assert torch.equal(mapped.get_parameter(name), own[name])


def test_recorded_forwards_know_their_step_and_their_expert():
    """With guidance Wan calls its expert twice a step: calls are no steps."""
    model = load_rows([*pipelines.overrides("wan"), "model.guidance=5", "method=rtn"])[-1].model
    pipe, prompts = load_pipeline(model), [Prompt("p", "a red cat")]
    forwards = record_forwards(pipe, model, prompts, 0, 1)
    steps = [forward.step for forward in forwards]
    assert steps == sorted([*range(model.steps), *range(model.steps)])
    experts = [forward.part for forward in forwards]
    assert experts == sorted(experts) and {*experts} == {"transformer", "transformer_2"}
    denoiser = denoiser_of(pipe)
    layers = list_layers(denoiser, model.family)
    one = [layer for layer in layers if layer.role == "ff_up"]
    quantized = quantize_model(denoiser, one[-1:], recipe("rtn"), progress=None)
    with quantized.applied(pipe):  # a layer of the second expert
        errors = output_errors(denoiser, forwards)
    second = {forward.step for forward in forwards if forward.part == "transformer_2"}
    assert [error > 0 for error in errors] == [step in second for step in range(model.steps)]
    first = [forward for forward in forwards if forward.part == "transformer"]
    with pytest.raises(LoraqError, match="No recorded step runs 'transformer_2"):
        measure_sensitivity(denoiser, make_units(one[-1:], True), recipe("rtn"), first, None)


def test_an_expert_that_no_step_runs_is_named(caplog):
    """One step is enough for the first expert alone."""
    pipe = pipelines.build("wan")
    file = pipelines.settings("wan")
    call = {**file.CALL, "num_inference_steps": 1}
    with pytest.raises(LoraqError, match=r"runs 16 of 32 layers.*'transformer_2.*model.steps"):
        loraq.quantize(pipe, "svdquant", prompts=PROMPT, call=call, progress=False)
    denoiser = denoiser_of(pipe)
    layers = [layer for layer in list_layers(denoiser, "generic") if layer.role == "ff_down"]
    quantized = quantize_model(denoiser, layers, recipe("rtn"), progress=None)
    inputs = {layers[0].shares_input: torch.randn(8, layers[0].shape[1])}
    errors = layer_errors(quantized, denoiser, layers, inputs)
    assert ["output_error" in row for row in errors] == [True, False, False, False]
    assert all(row["weight_error"] > 0 for row in errors)
    assert "runs 3 of 4 quantised layers" in caplog.text
