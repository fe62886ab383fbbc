"""Video and sound from start to end on little pipelines, and two experts in one of them."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

import loraq
from loraq.runner.experiment import run
from tests import pipelines

KINDS = {"wan": ("video", "psnr"), "ltx": ("video", "psnr"), "stable_audio": ("audio", "snr")}
PROMPTS = ["a red cat", "one blue dog"]


@pytest.mark.parametrize("name", KINDS)
def test_a_family_from_its_files_to_the_table(name, captions, tmp_path):
    """The recommended data-free recipe; for two experts also a calibrated one."""
    kind, metric = KINDS[name]
    settings = [
        *pipelines.overrides(name),
        f"data.captions={captions}",
        "data.count=2",
        "data.real=null",
        f"metrics.names=[{metric}]",
        "metrics.bootstrap=100",
        "calibration.prompts=2",
        "calibration.measure_prompts=2",
        "calibration.rows_per_layer=64",
        "quant.branch.steps=5",
        "tracking=disabled",
        "device=cpu",
        f"output={tmp_path}",
    ]
    for method in ("loraq_best", "svdquant") if name == "wan" else ("loraq_best",):
        _, row = run([f"method={method}", *settings], progress=False).records
        assert row.images["kind"] == kind
        assert 5 < row.metrics[metric]["value"] < 100


@pytest.mark.parametrize("name", KINDS)
def test_a_packed_pipeline_gives_the_same_frames_or_sound(name, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(pipelines.little_folder(name))
    pipe.set_progress_bar_config(disable=True)
    plain = pipelines.generate(pipe, name, PROMPTS)
    loraq.quantize(pipe, loraq.recipe("loraq_best", "quant.branch.steps=5"), progress=False)
    made = pipelines.generate(pipe, name, PROMPTS)
    assert not torch.equal(made, plain)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pipelines.generate(loaded, name, PROMPTS), made)


def test_one_expert_with_a_timestep_for_every_token_is_a_model_too(tmp_path):
    """Wan 2.2's 5B: `transformer_2` is null in model_index.json."""
    pipe = pipelines.settings("wan").pipeline(experts=1)
    pipe.save_pretrained(tmp_path / "model")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "model")
    loaded.set_progress_bar_config(disable=True)
    loraq.quantize(loaded, loraq.recipe("loraq_best", "quant.branch.steps=5"), progress=False)
    made = pipelines.generate(loaded, "wan", PROMPTS)
    loaded.save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    again.set_progress_bar_config(disable=True)
    assert torch.equal(pipelines.generate(again, "wan", PROMPTS), made)
