"""`loraq score`: the metrics equal those of the run that made the images."""

from __future__ import annotations

import json

import pytest
from diffusers import PixArtSigmaPipeline
from PIL import Image

import loraq
from loraq.cli import main
from loraq.compose import load_rows
from loraq.data import data_prompts
from loraq.metrics.common.image_set import ImageSet
from loraq.runner.experiment import run

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
