"""`loraq score`: the metrics equal those of the run that made the images."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel, TorchAoConfig
from PIL import Image
from torch import nn

import loraq
from loraq.cli import main
from loraq.compose import load_rows
from loraq.data import data_prompts
from loraq.errors import LoraqError
from loraq.metrics.common.image_set import ImageSet
from loraq.results.record import load_record
from loraq.runner.experiment import run
from loraq.runner.score import score_images

RECIPE = ("loraq_o2", "quant.branch.rank=4")


@pytest.fixture
def packed(tiny_folder, tmp_path):
    """A saved pipeline without the 16-bit weights of the quantised layers."""
    pipe = PixArtSigmaPipeline.from_pretrained(tiny_folder)
    made = loraq.quantize(pipe, loraq.recipe(*RECIPE), progress=False)
    pipe.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed", made


def test_a_saved_pipeline_scores_as_the_run_that_quantised_it(packed, overrides, tmp_path, capsys):
    folder, made = packed
    outcome = run([f"method={RECIPE[0]}", RECIPE[1], *overrides], progress=False)
    reference = _images(tmp_path / "outputs", outcome.records[0].images)
    capsys.readouterr()
    json_file = tmp_path / "scores.json"
    arguments = ["score", str(folder), *overrides[1:], "--quiet", "--json", str(json_file)]
    main([*arguments, "--against", str(reference)])
    shown = capsys.readouterr().out
    assert f"{made.bits_per_weight:.3f} bits/weight" in shown and "psnr ↑" in shown
    assert "model=tiny_pixart: height=64, width=64, steps=2, guidance=3.0\n" in shown
    assert "(too few images (N < 8) for an interval)" in shown
    found = json.loads(json_file.read_text())
    assert found["metrics"]["psnr"] == outcome.records[1].metrics["psnr"]
    assert found["packed"]["nbytes"] == made.nbytes
    main(arguments)
    assert "--against FOLDER" in capsys.readouterr().out
    one, other = sorted(reference.glob("*.png"))[:2]
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)  # both are valid images
    with pytest.raises(SystemExit):
        main([*arguments, "--against", str(reference)])
    assert f"{one.name} does not match its sha256" in capsys.readouterr().err


def test_a_saved_pipeline_may_be_the_model_of_a_run(packed, overrides):
    """Of its own images alone. The cost model refused it, as what quantises does."""
    folder, _ = packed
    run(["method=reference", *overrides[1:], f"model.path={folder}"])


def with_torchao(folder):
    """The pipeline with linear layers in torchao's INT8."""
    from torchao.quantization import Int8WeightOnlyConfig

    made = PixArtTransformer2DModel.from_pretrained(
        folder / "transformer",
        quantization_config=TorchAoConfig(Int8WeightOnlyConfig()),
        dtype=torch.float32,
    )
    return PixArtSigmaPipeline.from_pretrained(folder, transformer=made)


def _images(output, wanted):
    """The folder of the images of a record."""
    found = (folder for folder in (output / "images").iterdir() if folder.is_dir())
    sets = (ImageSet.of_folder(folder, wanted["names"]) for folder in found)
    return next(held.paths[0].parent for held in sets if held.hash == wanted["hash"])


def test_errors_name_the_cause(packed, overrides, tmp_path, capsys):
    folder, _ = packed
    for arguments, message in (
        ([str(tmp_path / "nothing")], "no folder"),
        ([str(tmp_path)], "images are missing"),
        ([str(folder), "data.cuont=1"], "count"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["score", *arguments, *overrides[1:]])
        assert caught.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["quantize", "method=rtn", f"model.path={folder}", *overrides[1:]])
    assert "quantised already (loraq)" in capsys.readouterr().err


def test_images_of_one_colour_are_named(overrides, tmp_path, capsys):
    """Black images on both sides would score as identical, the best possible."""
    settings = [*overrides[1:], "data.count=2", "metrics.names=[psnr]"]
    names = [
        prompt.name for prompt in data_prompts(load_rows(["method=reference", *settings])[0].data)
    ]
    for folder in ("own", "other"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / folder / f"{names[0]}.png")
        Image.linear_gradient("L").convert("RGB").crop((0, 0, 16, 16)).save(
            tmp_path / folder / f"{names[1]}.png"
        )
    json_file = tmp_path / "scores.json"
    given = ["score", str(tmp_path / "own"), *settings, "--against", str(tmp_path / "other")]
    main([*given, "--json", str(json_file)])
    error = capsys.readouterr().err
    assert f"1 of 2 images have one colour only ({names[0]})" in error
    assert "1 of 2 references have one colour only" in error
    assert json.loads(json_file.read_text())["one_colour"] == names[:1]


def test_what_is_wrong_is_said_before_the_pipeline_makes_an_image(
    packed, overrides, tmp_path, capsys
):
    folder, _ = packed
    settings = [*overrides[1:], "data.count=2", "--quiet"]
    config = load_rows(["method=reference", *settings[:-1]])[0]
    against = tmp_path / "against"
    against.mkdir()
    for prompt in data_prompts(config.data):
        Image.effect_noise((32, 32), 50).convert("RGB").save(against / f"{prompt.name}.PNG")
    (tmp_path / "file").write_text("x")
    for arguments, words in (
        (["--against", str(against)], "sizes [(32, 32), (64, 64)]"),
        (["metrics.names=[kid]"], "need real images"),
        (["metrics.names=[kid]", f"data.real={tmp_path}"], "2 of 2 images are missing"),
        (["--json", str(tmp_path / "file" / "scores.json")], "a file, not a folder"),
        (["--json", str(tmp_path)], "is a folder"),
    ):
        with pytest.raises(SystemExit) as caught:
            main(["score", str(folder), *settings, *arguments])
        assert caught.value.code == 2 and words in capsys.readouterr().err
    assert not list((tmp_path / "outputs").glob("images/*"))


def test_a_pipeline_of_another_library_is_a_row_beside_ours(
    tiny_folder, overrides, tmp_path, capsys, monkeypatch
):
    """torchao's INT8 weights: saved, in memory, and the same scores from both."""
    outcome = run(["method=rtn", *overrides], progress=False)
    folder, saved = tmp_path / "torchao-1.6b", tmp_path / "row.json"
    pipe = with_torchao(tiny_folder)
    pipe.save_pretrained(folder)
    beside = ["--beside", str(outcome.folder)]
    capsys.readouterr()
    main(["score", str(folder), *overrides[1:], *beside, "--record", str(saved), "--quiet"])
    shown = capsys.readouterr().out
    assert "int8 (Int8Tensor)" in shown and "Paired differences to rtn" in shown
    row = load_record(saved)
    assert row.row == folder.name
    held = row.budget["held"]
    linears = [one for one in pipe.transformer.modules() if isinstance(one, nn.Linear)]
    assert held["quantized_weights"] == sum(one.in_features * one.out_features for one in linears)
    scales = sum(one.out_features for one in linears)  # in float32, and a zero point of 8 bits
    bits = 8 + 8 * 5 * scales / held["quantized_weights"]
    assert row.budget["bits_per_weight"] == pytest.approx(bits)
    assert held["nbytes"] == sum(held["kinds"].values()) and row.timings["images"] > 0
    assert row.metrics["psnr"]["value"] > outcome.records[1].metrics["psnr"]["value"]

    reference = _images(tmp_path / "outputs", outcome.records[0].images)
    given = [*overrides, "model.dtype=bfloat16"]
    found = loraq.score(pipe, *given, against=reference, progress=False)
    assert found.record.config["model"]["dtype"] == "float32"  # that of the pipeline
    assert found.record.images["hash"] == row.images["hash"]
    assert found.metrics["psnr"] == row.metrics["psnr"] and found.held.plain() == held
    assert "s each with its text encoder" in found.text() and " s each\n" in shown
    with pytest.raises(LoraqError, match="holds files already"):
        loraq.score(pipe, *overrides, images=found.images, progress=False)
    with pytest.raises(LoraqError, match="those of a Sana"):
        loraq.score(pipe, "model=tiny_sana", progress=False)

    again = ["score", str(folder), *overrides[1:], *beside, "--quiet"]
    for more, words in (
        (["--name", "rtn"], "a row 'rtn' already"),
        (["--record", str(saved), "--beside", str(saved)], "is a row of --beside"),
        (["model.steps=3"], "was made with model.steps=2, this one with 3"),
        (["--against", str(found.images)], "other images than the 16-bit row 'reference'"),
        ([f"output={tmp_path / 'elsewhere'}"], "are not in"),
    ):
        with pytest.raises(SystemExit):
            main([*again, *more])
        assert words in capsys.readouterr().err
    with pytest.raises(LoraqError, match="'reference' has 4 images, and this one 2"):
        score_images(found.images, [*overrides[1:], "data.count=2"], None, False, [outcome.folder])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        main(["score", str(folder), *overrides[1:], "data.count=2", "--quiet"])
    assert "pip install torchao" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "quanto"}, "does not load completely"),
        ({"load_in_4bit": True}, "on a GPU alone"),
        ({"quant_method": "torchoa"}, "Did you mean 'torchao'"),
    ],
)
def test_what_cannot_load_a_network_is_refused_before(
    tiny_folder, overrides, tmp_path, monkeypatch, config, words
):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": config}))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)  # all are installed
    with pytest.raises(LoraqError, match=words):
        score_images(folder, overrides[1:], None, progress=False)


def test_images_without_captions_are_matched_by_file_name(tmp_path, caplog):
    for folder, sigma in (("own", 40), ("other", 50)):
        (tmp_path / folder).mkdir()
        for name in ("one", "two"):
            image = Image.effect_noise((32, 32), sigma).convert("RGB")
            image.save(tmp_path / folder / f"{name}.{'jpg' if folder == 'own' else 'png'}")
    own, other = tmp_path / "own", tmp_path / "other"
    scores = score_images(own, ["metrics.names=[psnr]"], other)
    assert scores.record.images["names"] == ["one", "two"]
    assert scores.metrics["psnr"]["n"] == 2 and scores.held is None
    with pytest.raises(LoraqError, match="alignment need captions or real images"):
        score_images(own, ["metrics.names=[psnr,alignment]"], other)
    (other / "two.png").rename(other / "two.tif")
    with pytest.raises(LoraqError, match=r"of these names, 1 as \.tif, which is not read"):
        score_images(own, ["metrics.names=[psnr]"], other)


def test_an_exported_pipeline_is_emulated(packed, overrides, tmp_path, monkeypatch):
    """Its codes and its branch in 16 bits are what is held, and its images are nearly ours."""
    folder, made = packed
    loraq.export(folder, tmp_path / "kitchen", "comfy-kitchen", progress=False)
    settings = [*overrides[1:], "data.count=2"]
    ours = score_images(folder, settings, None, progress=False)
    found = score_images(tmp_path / "kitchen", settings, ours.images, progress=False)
    assert found.metrics["psnr"]["value"] > 30
    assert found.record.config["method"] == "scored"  # not the 16-bit row of a table
    assert found.held.quantized_weights == ours.held.quantized_weights
    assert found.held.quantized_nbytes > ours.held.quantized_nbytes == made.nbytes
    path = tmp_path / "kitchen" / "text_encoder" / "config.json"
    config = {"quantization_config": {"quant_method": "sdnq"}}
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoraqError, match=r"text_encoder' is quantised with sdnq.*pip install sdnq"):
        score_images(tmp_path / "kitchen", settings, None, progress=False)
