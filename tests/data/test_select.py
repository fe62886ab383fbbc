"""Prompts, the seeds that follow from their names, and splits that never overlap."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loraq.compose import load_rows
from loraq.config import CalibrationConfig, DataConfig
from loraq.data import calibration_prompts, data_prompts, random_prompts, seed_of_name
from loraq.data.select import tokenizer_folder
from loraq.errors import LoraqError
from tests.little import WORDS, little_config

EMBEDDED = load_rows([])[0].model


def test_seed_is_the_protocols_polynomial():
    expected = 0
    for character in "rice_ball":
        expected = (expected * 31 + ord(character)) % (10**9 + 7)
    assert seed_of_name("rice_ball") == expected
    assert seed_of_name("rice_ball", 1) != expected
    assert seed_of_name("") == 0


def test_the_packages_captions_have_disjoint_splits():
    data = DataConfig(count=None)
    test = {prompt.name for prompt in data_prompts(data)}
    calibration, measuring = calibration_prompts(data, CalibrationConfig(), EMBEDDED)
    names = [{prompt.name for prompt in part} for part in (calibration, measuring)]
    assert not names[0] & names[1] and not test & (names[0] | names[1])


def test_limits_are_named(captions):
    data = DataConfig(captions=str(captions), count=9)
    with pytest.raises(LoraqError, match=r"data.count=9 .* 8 prompts"):
        data_prompts(data)
    with pytest.raises(LoraqError, match=r"data.split.*tests.*Did you mean 'test'"):
        data_prompts(DataConfig(captions=str(captions), split="tests"))
    with pytest.raises(LoraqError, match=r"need 9 .* 8 in split 'calibration'.*must not overlap"):
        calibration_prompts(data, CalibrationConfig(prompts=6, measure_prompts=3), EMBEDDED)


@pytest.mark.parametrize("name", ["a/b", ".hidden", "", "t"])
def test_names_that_cannot_be_files_are_refused(tmp_path, name):
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"test": [{"name": n, "prompt": "x"} for n in ("t", name)]}))
    with pytest.raises(LoraqError, match=r"usable as file names"):
        data_prompts(DataConfig(captions=str(path), count=2))


def test_a_file_that_is_no_captions_file_says_what_one_is(tmp_path):
    path = tmp_path / "captions.json"
    path.write_text('{"test": [{"nom": "x"}]}')
    with pytest.raises(LoraqError, match=r"is not a captions file"):
        data_prompts(DataConfig(captions=str(path)))
    with pytest.raises(LoraqError, match=r"does not exist"):
        data_prompts(DataConfig(captions=str(tmp_path / "none.json")))


def test_random_text_is_of_the_models_vocabulary_and_follows_from_its_seed(
    captions, tiny_folder, tmp_path
):
    """It needs no caption but those kept for measuring; special tokens do not occur."""
    model = little_config(path=str(tiny_folder))
    data = DataConfig(captions=str(captions), count=None)
    wanted = CalibrationConfig(text="random", prompts=40, measure_prompts=8)
    drawn, measuring = calibration_prompts(data, wanted, model)
    words = {word for prompt in drawn for word in prompt.prompt.split()}
    assert words == set(WORDS) and len(measuring) == 8
    lengths = {len(prompt.prompt.split()) for prompt in drawn}
    assert lengths == set(range(1, 7))
    assert drawn == random_prompts(40, 0, model) != random_prompts(40, 1, model)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LoraqError, match=r"tokenizer"):
        random_prompts(1, 0, little_config(path=str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("flux_1_dev", "tokenizer_2"),
        ("sd3_5_large", "tokenizer_3"),
        ("qwen_image", "tokenizer"),
        ("flux_2_dev", "tokenizer"),
    ],
)
def test_random_text_is_of_the_widest_text_encoders_vocabulary(name, tokenizer):
    folder = Path(__file__).parents[1] / "published" / name
    assert tokenizer_folder(folder) == folder / tokenizer
