"""A user's own pictures take the recipe: read with clear errors, split by the rule, trained."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from experiments.train_tiny import own, run, split
from experiments.train_tiny.data import picture
from experiments.train_tiny.settings import ASSETS, MODELS, ROOT
from loraq.errors import LoraqError
from tests.forked import start

COLOURS = ("red", "green", "blue", "orange")


def draw(folder: Path, count: int = 40) -> Path:
    """Pictures of two shapes in four colours, every other one wider than high, with captions."""
    folder.mkdir()
    for number in range(count):
        image = Image.new("RGB", (160 if number % 2 else 128, 128), "white")
        pen, colour = ImageDraw.Draw(image), COLOURS[number % 4]
        shape = "circle" if number % 8 < 4 else "square"
        (pen.ellipse if shape == "circle" else pen.rectangle)((40, 30, 100, 90), fill=colour)
        image.save(folder / f"Shape {number:02d}.png")
        (folder / f"Shape {number:02d}.txt").write_text(f"{colour} {shape} number {number}\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return draw(tmp_path_factory.mktemp("own") / "pictures")


def test_captions_in_three_layouts(folder, tmp_path):
    """Text files, captions.json and metadata.jsonl give the same items."""
    texts = own.items(folder)
    assert len(texts) == 40 and texts[1].name == "shape_01"
    assert texts[1].caption == "green circle number 1"
    for name, write in (
        ("captions.json", lambda rows: json.dumps(dict(rows))),
        (
            "metadata.jsonl",
            lambda rows: "".join(json.dumps({"file_name": k, "text": v}) + "\n" for k, v in rows),
        ),
    ):
        other = tmp_path / name.partition(".")[0]
        other.mkdir()
        for item in texts:
            (other / item.fluent.name).symlink_to(item.fluent)
        (other / name).write_text(write([(i.fluent.name, i.caption) for i in texts]))
        assert [(i.name, i.caption) for i in own.items(other)] == [
            (i.name, i.caption) for i in texts
        ]


def _few(folder: Path) -> None:
    for file in sorted(folder.glob("*.png"))[:21]:
        file.unlink()


def _bare(folder: Path) -> None:
    (folder / "Shape 03.txt").unlink()
    (folder / "Shape 04.txt").write_text(" \n")


def _lost(folder: Path) -> None:
    (folder / "captions.json").write_text(
        json.dumps({f.name: "a" for f in folder.glob("*.png")} | {"gone.png": "a"})
    )


def _clash(folder: Path) -> None:
    Image.new("RGB", (8, 8)).save(folder / "shape-03.png")
    (folder / "shape-03.txt").write_text("a")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_few, "19 pictures are too few .* at least 20"),
        (_bare, r"2 of 40 pictures have no caption \(Shape 03.png, Shape 04.png\)"),
        (_lost, r"1 captions name no picture of this folder \(gone.png\)"),
        (_clash, "clashes with"),
        (lambda f: (f / "captions.json").write_text("{"), "is not JSON"),
        (lambda f: (f / "metadata.jsonl").write_text('{"a": 1}\n'), "line 1: expected"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(damage, message, tmp_path):
    """Each error says what is wrong, of which files, and what to do."""
    made = draw(tmp_path / "pictures")
    damage(made)
    with pytest.raises(LoraqError, match=message):
        own.items(made)


def test_pictures_are_decoded_before_anything_runs(folder, tmp_path):
    """Other sizes are counted; a file cut short is refused by name."""
    assert own.check_pictures(own.items(folder)).startswith("20 of 40 pictures are not 128 x 128")
    made = draw(tmp_path / "pictures")
    whole = (made / "Shape 05.png").read_bytes()
    (made / "Shape 05.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(LoraqError, match=r"1 of 40 pictures cannot be read \(Shape 05.png\)"):
        own.check_pictures(own.items(made))


def test_a_wide_picture_is_cropped_not_squeezed(folder):
    """The circle of a wide picture stays as high as wide."""
    dark = picture(folder / "Shape 01.png", 128).min(-1) < 128
    assert abs(int(dark.any(0).sum()) - int(dark.any(1).sum())) <= 1


@pytest.mark.parametrize("count", [20, 40, 333, 5000])
def test_sizes_of_the_splits(count):
    """Any number of pictures gives disjoint splits that the rule accepts; many, the emoji's."""
    settings = own.sizes(count)
    made = split.make_split([f"n{i}" for i in range(count)], settings)
    assert min(map(len, (made.held_test, made.held_dev, made.calibration, made.seen_dev))) > 0
    assert len(made.train) + len(made.held_test) + len(made.held_dev) == count
    if count == 5000:
        assert (settings.held_test, settings.held_dev, settings.calibration) == (128, 32, 128)


def test_other_pictures_do_not_resume_a_training(folder, tmp_path):
    """The folder of results knows its pictures; changed ones are refused."""
    items, record = own.items(folder), tmp_path / "own_data.json"
    own.check_same(items, record)
    own.check_same(items, record)
    with pytest.raises(LoraqError, match="holds a training of 40 other pictures"):
        own.check_same(items[1:], record)


def test_results_of_own_pictures_never_go_to_the_assets(folder):
    """--out inside the assets, over the pictures, or missing is refused."""
    for out in (ASSETS / "mine", folder):
        with pytest.raises(LoraqError, match="give a folder of your own"):
            run.environment("tiny_flux", False, folder, out)
    with pytest.raises(LoraqError, match="belong together"):
        run.environment("tiny_flux", False, folder, None)
    for command in run.stages(MODELS["tiny_flux"], own=Path("/o")):
        assert str(ROOT) not in " ".join(command)


STAGES = """
import dataclasses, json, runpy, sys
from experiments.train_tiny import settings
small = dict(width=128, heads=2, text_width=64, pooled_width=64, vocab_size=300, inference_steps=2)
made = dataclasses.replace(
    settings.SETTINGS, vae_channels=(8, 8, 8, 8), latent_channels=4, single_blocks=1, **small
)
settings.SETTINGS = settings.MODELS[made.name] = made
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    runpy.run_module(f"experiments.train_tiny.{name}", run_name="__main__")
"""


def test_forty_pictures_become_a_model(folder, tmp_path):
    """All stages of a small FLUX on 40 pictures: splits, weights, table, scores, card, YAML."""
    out = tmp_path / "out"
    variables = run.environment("tiny_flux", True, folder, out)
    variables |= {"LORAQ_WORKERS": "1", "WANDB_MODE": "disabled"}
    fewer = {
        "vae": ["vae", "--steps", "2", "--size", "4"],
        "train": ["train", "--steps", "2", "1", "--sizes", "4", "2"],
    }
    commands = [fewer.get(c[0], c) for c in run.stages(MODELS["tiny_flux"], True, out)]
    log = tmp_path / "log"
    process = start(STAGES, json.dumps(commands), output=log, **variables)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    assert "20 of 40 pictures are not 128 x 128" in log.read_text()
    lists = json.loads((out / "captions.json").read_text())
    assert [len(lists[k]) for k in ("calibration", "development", "test")] == [28, 4, 8]
    with (out / "record/tiny_flux_weights.csv").open() as stream:
        roles = {row["role"] for row in csv.DictReader(stream)}
    assert len(roles) > 8  # double- and single-stream blocks
    rows = json.loads((out / "record/tiny_flux_scores.json").read_text())["rows"]
    assert set(rows["this model"]) == {"fd_efflite0"}  # the alignment proxy learned emoji
    assert Image.open(out / "tiny_flux_grid.png").size == (1024, 128)
    card = (out / "tiny_flux/README.md").read_text()
    assert "34 pictures of a user's folder; 6 more are held" in card
    written = yaml.safe_load((out / "tiny_flux.yaml").read_text())
    assert written["path"] == str((out / "tiny_flux").resolve())
    pipe = FluxPipeline.from_pretrained(out / "tiny_flux", torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    image = pipe(
        "green circle number 1",
        height=written["height"],
        width=written["width"],
        num_inference_steps=2,
        max_sequence_length=written["max_sequence_length"],
        **written["call"],
        output_type="pt",
    ).images
    assert image.shape == (1, 3, 128, 128) and image.isfinite().all()
