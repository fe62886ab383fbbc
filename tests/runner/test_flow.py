"""Every family of image models from start to end, on its little pipeline: quantised, generated
with recorded text, measured, saved packed and loaded.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import loraq
from loraq.runner.experiment import run
from tests import pipelines

FAMILIES = (
    "aura_flow",
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
def test_a_family_from_its_files_to_the_table(name, captions, tmp_path):
    """loraq_best: rotation, smoothing, GPTQ and statistics of weights; svdquant: calibrated."""
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
        "tracking=disabled",
        "device=cpu",
        f"output={tmp_path}",
    ]
    for method in ("loraq_best", "svdquant"):
        _, row = run([f"method={method}", "quant.branch.steps=5", *settings], progress=False).records
        assert 5 < row.metrics["psnr"]["value"] < 100


@pytest.mark.parametrize("name", FAMILIES)
def test_a_packed_pipeline_of_a_family_gives_the_same_images(name, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines.little_folder(name))
    pipe.set_progress_bar_config(disable=True)
    recipe = loraq.recipe("loraq_best", "quant.branch.steps=5")
    loraq.quantize(pipe, recipe, progress=False)
    made = pipelines.generate(pipe, name, PROMPTS)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pipelines.generate(loaded, name, PROMPTS), made)
