"""`loraq save`: the folder of a row's packed pipeline."""

from __future__ import annotations

import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

import loraq
from loraq.cli import main
from loraq.diffusers_quantizer import packed_layers
from loraq.errors import LoraqError
from loraq.runner.experiment import run
from loraq.runner.save import save_row


def test_a_row_is_saved_with_its_scores(overrides, tmp_path, capsys, monkeypatch):
    settings = ["method=rtn", *overrides]
    with monkeypatch.context() as of_two:
        of_two.setenv("RANK", "1")
        assert save_row(settings, tmp_path / "before", False).endswith("saved by rank 0")
    assert not (tmp_path / "before").exists()
    save_row(settings, tmp_path / "before", progress=False)
    assert "Not measured" in (tmp_path / "before" / "README.md").read_text("utf-8")

    record = run(settings, progress=False).records[1]
    main(["save", str(tmp_path / "packed"), "--quiet", *settings])
    assert f"rtn: {record.budget['bits_per_weight']:.3f} bits/weight" in capsys.readouterr().out
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    assert packed_layers(pipe).nbytes == record.budget["nbytes"]
    assert pipe.text_encoder is not None
    card = (tmp_path / "packed" / "README.md").read_text("utf-8")
    assert f"{record.metrics['psnr']['value']:.2f}" in card and record.key in card
    assert "\n\n\n" not in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["before", "outputs", "packed"]

    pipe.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_text("utf-8") == card
    loraq.export(pipe, tmp_path / "exported", "comfy-kitchen", progress=False)
    assert record.key not in (tmp_path / "exported" / "README.md").read_text("utf-8")
    with torch.no_grad():
        next(pipe.vae.parameters()).add_(1)
    pipe.save_pretrained(tmp_path / "packed")
    card = (tmp_path / "packed" / "README.md").read_text("utf-8")
    assert record.key not in card and "has scores, but other tensors" in card


def test_what_is_not_one_row_or_a_new_folder_is_refused_before_anything_runs(
    overrides, tiny_folder, tmp_path
):
    incomplete = shutil.copytree(tiny_folder, tmp_path / "incomplete")
    (incomplete / "text_encoder" / "model.safetensors").unlink()
    for wrong, message in (
        (["method=rtn", f"model.path={incomplete}"], "is incomplete: text_encoder"),
        (["method=reference"], r"have 0 \(none, only the 16-bit model\)"),
        (["experiment=demo"], r"Add row=NAME"),
    ):
        with pytest.raises(LoraqError, match=message):
            save_row([*overrides, *wrong], tmp_path / "packed", progress=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(LoraqError, match="full' is not empty"):
        save_row(["method=rtn", *overrides], tmp_path / "full", progress=False)
    assert not (tmp_path / "packed").exists() and not (tmp_path / "outputs" / "quantised").exists()
