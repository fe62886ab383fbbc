"""Prompt sets in their publishers' layouts: read, cut to the reference's subset, refused."""

from __future__ import annotations

import json
import random

import pytest
import yaml

from loraq.compose import load_rows
from loraq.config import CalibrationConfig, DataConfig
from loraq.data import calibration_prompts, data_prompts, real_image_paths, seed_of_name
from loraq.data.manifest import INCOMPLETE, MANIFEST
from loraq.data.sets import SETS
from loraq.errors import LoraqError
from tests.data.layouts import mjhq_folder, picture

MODEL = load_rows([])[0].model


@pytest.fixture
def mjhq(tmp_path):
    return mjhq_folder(tmp_path / "MJHQ-30K", 40)


def test_the_subset_is_the_references(mjhq):
    """Its rule restated: names in the file's order, shuffled by Random(0), cut, sorted."""
    meta = json.loads((mjhq / "meta_data.json").read_text())
    names = list(meta)
    random.Random(0).shuffle(names)
    wanted = sorted(names[:7])
    found = data_prompts(DataConfig(set="mjhq", captions=str(mjhq), count=7))
    assert [prompt.name for prompt in found] == wanted
    assert [prompt.prompt for prompt in found] == [meta[name]["prompt"] for name in wanted]
    everything = data_prompts(DataConfig(set="mjhq", captions=str(mjhq), count=None))
    assert [prompt.name for prompt in everything] == list(meta)


def test_the_images_are_those_of_the_names(mjhq):
    names = [p.name for p in data_prompts(DataConfig(set="mjhq", captions=str(mjhq), count=5))]
    paths = real_image_paths("mjhq", mjhq, names)
    assert [path.read_bytes() for path in paths] == [picture(name) for name in names]
    paths[2].unlink()
    with pytest.raises(LoraqError, match=rf"1 of 5 images of 'mjhq'.*{names[2]}.*loraq fetch mjhq"):
        real_image_paths("mjhq", mjhq, names)
    with pytest.raises(LoraqError, match=r"'parti' has no images"):
        real_image_paths("parti", mjhq, names)


def test_calibration_reads_what_the_run_leaves(mjhq):
    data = DataConfig(set="mjhq", captions=str(mjhq), count=20)
    settings = CalibrationConfig(prompts=12, measure_prompts=8)
    calibration, measuring = calibration_prompts(data, settings, MODEL)
    taken = [
        prompt.name for part in (data_prompts(data), calibration, measuring) for prompt in part
    ]
    assert len(taken) == len(set(taken)) == 40
    with pytest.raises(LoraqError, match=r"need 21 .*there are 20 in .*calibration.captions="):
        calibration_prompts(data, CalibrationConfig(prompts=12, measure_prompts=9), MODEL)


def test_calibration_may_have_a_list_of_its_own(mjhq, tmp_path):
    """The reference's own list is YAML, NAME: PROMPT, and its names look like numbers."""
    path = tmp_path / "qdiff.yaml"
    path.write_text("'0000': three people\n0008: 'a boy '\n'0010': a bean\n")
    data = DataConfig(set="mjhq", captions=str(mjhq), count=None)
    settings = CalibrationConfig(captions=str(path), set="file", prompts=2, measure_prompts=1)
    calibration, measuring = calibration_prompts(data, settings, MODEL)
    read = {prompt.name: prompt.prompt for prompt in calibration + measuring}
    assert read == {"0000": "three people", "0008": "a boy ", "0010": "a bean"}


FILES = {
    "list.txt": "a cat\na dog\n",
    "list.csv": 'Category,Prompts\nx,a cat\ny,"a dog"\n',
    "list.tsv": "Prompt\tCategory\na cat\tx\na dog\ty\n",
    "list.jsonl": '{"prompt": "a cat", "tag": "x"}\n{"prompt": "a dog"}\n',
}


@pytest.mark.parametrize("name", FILES)
def test_lists_of_ones_own_are_named_by_their_place(tmp_path, name):
    path = tmp_path / name
    path.write_text(FILES[name])
    found = data_prompts(DataConfig(set="file", captions=str(path), count=None))
    assert [(p.name, p.prompt) for p in found] == [("0000", "a cat"), ("0001", "a dog")]
    first = data_prompts(DataConfig(set="file", captions=str(path), count=1))
    assert first == found[:1]


LAYOUTS = {
    "parti": ("PartiPrompts.tsv", "Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"),
    "drawbench": ("drawbench.csv", "Prompts,Category\nbond,Colors\n"),
    "geneval": ("evaluation_metadata.jsonl", '{"tag": "single_object", "prompt": "bond"}\n'),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_sets_without_images(tmp_path, name):
    file, text = LAYOUTS[name]
    (tmp_path / file).write_text(text)
    found = data_prompts(DataConfig(set=name, captions=str(tmp_path), count=None))
    assert [(p.name, p.prompt) for p in found] == [("0000", "bond")]


def test_coco_takes_one_caption_an_image_by_its_names_hash(tmp_path):
    images = [
        {
            "filename": f"COCO_val2014_{number:012d}.jpg",
            "split": "val" if number < 3 else "restval",
            "sentences": [{"raw": f"caption {i} of {number}"} for i in range(5)],
        }
        for number in range(5)
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    data = DataConfig(set="coco", captions=str(tmp_path), split="val", count=None)
    found = data_prompts(data)
    assert len(found) == 3
    for number, prompt in enumerate(found):
        assert prompt.prompt == f"caption {seed_of_name(prompt.name) % 5} of {number}"
    assert SETS["coco"].image(tmp_path, found[0].name).parent.name == "val2014"
    with pytest.raises(LoraqError, match=r"Unknown split of COCO 'vol'"):
        data_prompts(DataConfig(set="coco", captions=str(tmp_path), split="vol"))


REFUSED = {
    "a blank line": ("list.txt", "a cat\n\na dog\n", "1 of 3 lines are blank, the first is line 2"),
    "an empty prompt": ("list.yaml", "x: a\ny: ''\n", "blank, the first is 'y'"),
    "no mapping": ("list.yaml", "- a\n- b\n", "mapping is expected, not sequence"),
    "broken YAML": ("list.yaml", "a: [\n", "is not a prompt file"),
    "no column of prompts": ("list.csv", "text\na\n", "no column 'prompt' in"),
    "broken JSON": ("list.jsonl", '{"prompt": \n', "list.jsonl', line 1: JSONDecodeError"),
    "a name that is a path": ("list.yaml", "../x: a\n", "usable as file names"),
    "an unknown kind": ("list.docx", "a", "Unknown kind of prompt file '.docx'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_with_a_list_is_said(tmp_path, case):
    name, text, words = REFUSED[case]
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(LoraqError, match=words):
        data_prompts(DataConfig(set="file", captions=str(path), count=None))


def test_a_set_without_its_folder_says_how_to_get_it(tmp_path):
    with pytest.raises(LoraqError, match=r"needs data.captions=FOLDER. `loraq fetch mjhq FOLDER`"):
        data_prompts(DataConfig(set="mjhq", captions=None))
    (tmp_path / "nine.txt").write_text("a cat\n")
    with pytest.raises(LoraqError, match=r"nine' does not exist\. Did you mean '.*nine\.txt'"):
        data_prompts(DataConfig(set="file", captions=str(tmp_path / "nine")))
    with pytest.raises(LoraqError, match=r"does not exist"):
        data_prompts(DataConfig(set="mjhq", captions=str(tmp_path / "none")))
    with pytest.raises(LoraqError, match=r"one file meta_data.json; the folder has none"):
        data_prompts(DataConfig(set="mjhq", captions=str(tmp_path)))
    with pytest.raises(LoraqError, match=r"Get it from https://github.com/djghosh13/geneval"):
        data_prompts(DataConfig(set="geneval", captions=str(tmp_path)))
    with pytest.raises(LoraqError, match=r"Unknown prompt set 'mjqh'. Did you mean 'mjhq'"):
        data_prompts(DataConfig(set="mjqh", captions=str(tmp_path)))


def test_what_was_interrupted_or_has_shrunk_is_not_read(mjhq):
    data = DataConfig(set="mjhq", captions=str(mjhq), count=3)
    (mjhq / INCOMPLETE).write_text("mjhq")
    with pytest.raises(LoraqError, match=r"interrupted. `loraq fetch mjhq .*resumes"):
        data_prompts(data)
    (mjhq / INCOMPLETE).unlink()
    file = mjhq / "meta_data.json"
    entry = {"bytes": file.stat().st_size, "sha256": ""}
    manifest = {"set": "mjhq", "files": {file.name: entry, "gone.zip": entry}}
    (mjhq / MANIFEST).write_text(json.dumps(manifest | {"unpacked": {"gone.zip": 40}}))
    assert len(data_prompts(data)) == 3
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(LoraqError, match=r"says .* `loraq fetch mjhq .*restores it"):
        data_prompts(data)


def test_every_published_set_has_a_preset():
    from loraq.compose import CONF

    for name in SETS:
        values = yaml.safe_load((CONF / "data" / f"{name}.yaml").read_text())
        assert values["set"] == name and (values["real"] == "set") == (
            SETS[name].image is not None and name != "captions"
        )
