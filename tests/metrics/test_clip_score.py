"""CLIPScore against torchmetrics, on one random CLIP."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.parity.clip import Restored, write_clip
from loraq.errors import LoraqError
from loraq.metrics import clip_score as metric
from loraq.metrics.registry import compute

BOUND = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    write_clip(folder)
    return folder


@pytest.fixture
def given(folder, monkeypatch):
    monkeypatch.setenv(metric.VARIABLE, str(folder))
    metric.load_clip.cache_clear()
    return folder


def test_every_score_is_torchmetrics(given, noisy):
    from torchmetrics.functional.multimodal import clip_score

    prompts = list(noisy.prompts)
    prompts[1] = "a prompt that goes on and on, " * 5  # more than 77 tokens of one letter each
    images = type(noisy)(noisy.paths, noisy.names, prompts=tuple(prompts))
    found = compute("clip_score", images, batch_size=3)
    model, processor = metric.load_clip(given, "cpu")
    for place, prompt in enumerate(prompts):
        picture = torch.from_numpy(images.read(place)).permute(2, 0, 1)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            wanted = clip_score(picture, prompt, lambda: (Restored(model), processor))
        assert max(found.per_image[place], 0.0) == pytest.approx(float(wanted), abs=BOUND)
    assert np.std(found.per_image) > 0.5 and found.details["cut"] == 1
    assert compute("clip_score", images, batch_size=1).per_image == pytest.approx(
        found.per_image, abs=1e-4
    )


def test_what_is_missing_is_said_before_anything_runs(folder, monkeypatch, tmp_path):
    from loraq.metrics.registry import metric_sources

    monkeypatch.setenv(metric.VARIABLE, str(tmp_path))
    for name in metric.FILES:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    with pytest.raises(LoraqError, match=r"needs model.safetensors in the folder LORAQ_CLIP="):
        metric_sources(["clip_score"])
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    metric.load_clip.cache_clear()
    for check in (
        lambda: metric_sources(["clip_score"]),
        lambda: metric.load_clip(tmp_path, "cpu"),
    ):
        with pytest.raises(LoraqError, match=r"model.safetensors' is not a valid safetensors file"):
            check()
    weights = load_file(folder / metric.WEIGHTS)  # transformers draws what is missing at random
    weights.pop("visual_projection.weight")
    save_file(weights, tmp_path / metric.WEIGHTS, {"format": "pt"})
    for check in (
        lambda: metric_sources(["clip_score"]),
        lambda: metric.load_clip(tmp_path, "cpu"),
    ):
        with pytest.raises(LoraqError, match=r"lack 1 tensor \(visual_projection.weight\)"):
            check()


def test_scores_that_are_not_finite_are_refused(folder, noisy, monkeypatch, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / metric.WEIGHTS)
    weights["visual_projection.weight"][0] = float("nan")
    save_file(weights, tmp_path / metric.WEIGHTS, {"format": "pt"})
    monkeypatch.setenv(metric.VARIABLE, str(tmp_path))
    with pytest.raises(LoraqError, match="clip_score gives nan"):
        compute("clip_score", noisy.subset([0]))


def test_clip_iqa_is_torchmetrics_image_by_image(given, noisy, monkeypatch):
    from torchmetrics.functional.multimodal import clip_image_quality_assessment, clip_iqa

    found = compute("clip_iqa", type(noisy)(noisy.paths, noisy.names), batch_size=3)
    model, processor = metric.load_clip(given, "cpu")
    monkeypatch.setattr(
        clip_iqa, "_get_clip_iqa_model_and_processor", lambda _name: (Restored(model), processor)
    )
    pixels = torch.cat(list(noisy.batches(10))).float()
    wanted = clip_image_quality_assessment(pixels, "openai/clip-vit-large-patch14", data_range=1.0)
    assert found.per_image == pytest.approx(wanted.tolist(), rel=1e-3)  # of 1e-11 to 1e-6
    assert np.std(np.log(found.per_image)) > 1
