"""Families of image models from start to end on little pipelines, and one without a family file."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import loraq
from loraq.diffusers_quantizer import packed_layers
from loraq.runner.experiment import run
from tests import pipelines

FAMILIES = (
    "aura_flow",  # no file
    "flux",
    "flux2",
    "pixart_alpha",
    "qwen_image",
    "sana_sprint",
    "sd3",
    "z_image",
)
PROMPTS = ["a red cat", "one blue dog"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_recommended_recipe_runs_from_files_to_table(name, captions, tmp_path):
    """With rotation, smoothing and GPTQ from the weights' statistics, and recorded text."""
    settings = [
        *pipelines.overrides(name),
        f"data.captions={captions}",
        "data.count=2",
        "data.real=null",
        "metrics.names=[psnr]",
        "metrics.bootstrap=100",
        "calibration.prompts=2",
        "calibration.measure_prompts=2",
        "calibration.rows_per_layer=64",
        "quant.branch.steps=2",
        "tracking=disabled",
        "device=cpu",
        f"output={tmp_path}",
    ]
    _, row = run(["method=loraq_best", *settings], progress=False).records
    assert 10 < row.metrics["psnr"]["value"] < 100


@pytest.mark.parametrize("name", FAMILIES)
def test_a_calibrated_packed_pipeline_gives_the_same_images(name, tmp_path):
    """SVDQuant, with smoothing by balance instead of a search, which takes most of its time."""
    pipe = DiffusionPipeline.from_pretrained(pipelines.little_folder(name))
    pipe.set_progress_bar_config(disable=True)
    plain = pipelines.generate(pipe, name, PROMPTS)
    file = pipelines.settings(name)
    recipe = loraq.recipe("svdquant", "quant.transform.smooth=balanced", "quant.branch.steps=2")
    call = {**file.CALL, "num_inference_steps": file.STEPS}
    made = loraq.quantize(pipe, recipe, prompts=PROMPTS, call=call, progress=False)
    images = pipelines.generate(pipe, name, PROMPTS)
    error = (images - plain).square().mean()
    assert 10 < -10 * error.log10() < 100  # PSNR
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pipelines.generate(loaded, name, PROMPTS), images)
    again = packed_layers(loaded)
    assert (again.nbytes, again.ranks) == (made.nbytes, made.ranks)
