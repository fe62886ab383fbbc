"""The text of any pipeline: its own call gets recorded answers, and makes the same images."""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models import call, load_pipeline
from loraq.models.families import pixart_sigma
from loraq.models.hollow import hollow_parts
from loraq.runner import embeddings, notes, session
from loraq.runner.embeddings import read_text, to_bytes
from loraq.runner.estimate import dry_run
from loraq.runner.experiment import run
from loraq.runner.generate import image_batch
from loraq.runner.kept_values import comparable, describe, rebuild
from loraq.runner.outputs import check_made_size
from loraq.runner.recording import Recording, record, returned_names, text_methods
from tests import pipelines
from tests.damage import flip_bit
from tests.little import little_config
from tests.runner import text_survey
from tests.settings import small_run

PROMPTS = ["a red cat", "one blue fish a green dog"]


def made(pipe: Any, name: str, prompts: list[str], **settings: Any) -> Any:
    """What the little pipeline makes of prompts, before it is turned into a file."""
    own = pipelines.settings(name)
    output = "latent" if "audio" in name else "pt"
    generators = [torch.Generator().manual_seed(number) for number in range(len(prompts))]
    arguments = {"num_inference_steps": own.STEPS, **own.CALL, **settings}
    pipe.set_progress_bar_config(disable=True)
    with torch.inference_mode():  # Z-Image changes the list of prompts
        found = pipe(prompt=[*prompts], generator=generators, output_type=output, **arguments)
    return found[0]


def kept(recording: Recording, folder: Path) -> Recording:
    """The recording as it is read from its file."""
    path = folder / "text.safetensors"
    path.write_bytes(to_bytes(recording))
    found = read_text(path, "cpu")
    assert isinstance(found, Recording)
    return found


def without_text(pipe: Any) -> Any:
    for name in pipe.components:
        if name.startswith("text_encoder"):
            setattr(pipe, name, None)
    return pipe


@functools.cache
def encoding_pipe(name: str) -> Any:
    """The pipeline with its text encoders, and without a single weight of denoiser and decoder."""
    folder = pipelines.little_folder(name)
    hollow = hollow_parts(little_config(path=str(folder)), "cpu")
    assert not any(list(part.parameters()) + list(part.buffers()) for part in hollow.values())
    return diffusers.DiffusionPipeline.from_pretrained(folder, **hollow)


@pytest.mark.parametrize("name", pipelines.names())
def test_replayed_text_makes_the_same_output_bit_for_bit(name, tmp_path):
    """That another prompt makes another output is tested beside the pipelines."""
    pipe = pipelines.build(name)
    wanted = made(pipe, name, PROMPTS)
    encoder = encoding_pipe(name)
    text = kept(record(encoder, [2], lambda _: made(encoder, name, PROMPTS)), tmp_path)
    # A batch with values that are not finite is made again; two denoisers stand for all here.
    for _ in range(1 + (name == "wan")):
        with text.answering(without_text(pipe)):
            found = made(pipe, name, PROMPTS)
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(wanted))


@pytest.mark.parametrize("name", pipelines.names())
def test_another_call_than_the_recorded_one_is_refused(name):
    encoder = encoding_pipe(name)
    text = record(encoder, [1], lambda _: made(encoder, name, PROMPTS[:1]))
    refused = pytest.raises(LoraqError, match=r"made for another call\. Remove them")
    with refused, text.answering(encoder):
        made(encoder, name, PROMPTS[1:])
    assert "encode_prompt" not in vars(encoder) and "prepare_latents" not in vars(encoder)


def test_every_call_of_a_batch_is_kept_for_itself():
    encoder = encoding_pipe("wan")
    text = record(encoder, [1, 1], lambda number: made(encoder, "wan", [PROMPTS[number]]))
    names = ["0.0.negative_prompt_embeds", "0.0.prompt_embeds"]
    assert sorted(text.tensors) == [*names, *(f"1{name[1:]}" for name in names)]
    second = text.part(1, 1).calls
    assert [answers[0].arguments["prompt"] for _, answers in second] == [PROMPTS[1:]]
    with pytest.raises(LoraqError, match=r"Prompts 1 to 2 .* \[1, 1\] prompts at a time"):
        text.part(0, 2)


def test_a_negative_prompt_and_no_guidance_are_kept(tmp_path):
    pipe, encoder = pipelines.build("wan"), encoding_pipe("wan")
    settings = [{"negative_prompt": "a dog", "guidance_scale": 3.0}, {"guidance_scale": 1.0}]
    wanted = [made(pipe, "wan", PROMPTS, **own) for own in settings]
    assert not torch.equal(*map(torch.as_tensor, wanted))
    for own, images in zip(settings, wanted, strict=True):
        text = kept(record(encoder, [2], lambda _: made(encoder, "wan", PROMPTS, **own)), tmp_path)  # noqa: B023
        with text.answering(pipe):
            assert torch.equal(*map(torch.as_tensor, (made(pipe, "wan", PROMPTS, **own), images)))
        refused = pytest.raises(LoraqError, match=r"do_classifier_free_guidance=\w+, not \w+")
        with refused, text.answering(pipe):
            made(pipe, "wan", PROMPTS, **settings[own is settings[0]])


@pytest.fixture(scope="module")
def named(tiny_folder, captions, tmp_path_factory):
    """A run with named embeddings: its folder and its records."""
    folder = tmp_path_factory.mktemp("named")
    outcome = run(["method=rtn", *small_run(tiny_folder, captions, folder)], progress=False)
    return folder, outcome.records


def test_a_run_with_recorded_text_gives_the_images_of_named_embeddings(
    named, overrides, tmp_path, monkeypatch
):
    """The whole flow on a pipeline that has both: plan, text, calibration, images, resumed."""
    monkeypatch.setattr(pixart_sigma, "EMBEDDINGS", ())
    recorded = run(["method=rtn", *overrides], progress=False)
    folders = [named[0], tmp_path / "outputs"]
    first, second = (
        {path.name: path for path in folder.glob("images/*/*.png")} for folder in folders
    )
    assert len(first) == 4 and first.keys() == second.keys()
    for name, path in first.items():
        with Image.open(path) as one, Image.open(second[name]) as two:
            assert one.tobytes() == two.tobytes()
    assert named[1][0].metrics == recorded.records[0].metrics
    file = next(folders[1].glob("embeddings/*/00001.safetensors"))
    assert b"recorded" in file.read_bytes()[:100]


def test_a_damaged_file_is_refused(tmp_path):
    encoder = encoding_pipe("wan")
    text = record(encoder, [1], lambda _: made(encoder, "wan", PROMPTS[:1]))
    path = tmp_path / "00000.safetensors"
    path.write_bytes(to_bytes(text))
    flip_bit(path, 9)  # in the JSON of the header
    with pytest.raises(LoraqError, match=r"is damaged .*; delete it and run again"):
        read_text(path, "cpu")


def test_a_pipeline_that_encodes_nothing_is_refused():
    encoder = encoding_pipe("wan")
    with pytest.raises(LoraqError, match=r"WanPipeline calls none of its .*encode_prompt before"):
        record(encoder, [1], lambda _: None)


def test_structures_come_back_as_they_were():
    shared = torch.arange(6.0).view(2, 3)
    value = ([shared, shared.T], None, {"mask": torch.ones(2, dtype=torch.bool), "n": 3}, "text")
    tensors: dict[str, torch.Tensor] = {}
    described = describe(value, "0", ["embeds", "pooled", "more", "word"], tensors, shared.device)
    assert list(tensors) == ["0.embeds.0", "0.embeds.1", "0.more.mask"]
    back = rebuild(json.loads(json.dumps(described)), tensors, "cpu")
    assert type(back) is tuple and type(back[0]) is list and back[1] is None and back[3] == "text"
    assert torch.equal(back[0][1], shared.T) and back[2]["n"] == 3
    back[0][0].zero_()  # a pipeline may change what it gets
    assert torch.equal(rebuild(described, tensors, "cpu")[0][0], shared)
    with pytest.raises(LoraqError, match="A set cannot be kept"):
        describe({1}, "0", (), tensors, shared.device)


def test_arguments_are_compared_by_value():
    assert comparable((1, [torch.float16], {"a": None}), "f(x=…)") == [
        1,
        ["torch.float16"],
        {"a": None},
    ]
    one, two = torch.zeros(2), torch.zeros(2, dtype=torch.int32)
    assert comparable(one, "") == comparable(one.clone(), "") != comparable(two, "")
    with pytest.raises(LoraqError, match=r"f\(image=…\) is a Image, .*Leave the argument out"):
        comparable(Image.new("RGB", (1, 1)), "f(image=…)")


def test_returned_values_have_the_names_of_the_source():
    flux = diffusers.FluxPipeline
    assert returned_names(flux.encode_prompt) == [
        "prompt_embeds",
        "pooled_prompt_embeds",
        "text_ids",
    ]
    assert returned_names(diffusers.StableAudioPipeline.encode_prompt) == ["prompt_embeds"]
    assert returned_names(torch.zeros) == []
    assert "encode_prompt" in text_methods(flux) and "check_inputs" not in text_methods(flux)


def test_a_pipeline_without_encode_prompt_is_called_with_prompts(
    named, overrides, tmp_path, monkeypatch
):
    """The text encoders stay, and the images are those of encoded prompts; the plan says it."""
    for module in (call, session, embeddings, notes):
        monkeypatch.setattr(module, "encodes_apart", lambda _pipeline: False)
    assert "PixArtSigmaPipeline has no encode_prompt, so it is called" in dry_run(
        ["method=rtn", *overrides]
    )
    run(["method=rtn", *overrides], progress=False)
    first, second = (
        sorted(folder.glob("images/*/*.png")) for folder in (named[0], tmp_path / "outputs")
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second] != []


def test_names_of_embeddings_are_for_the_pipelines_of_the_family():
    model = little_config(family="sana", path="sana")
    assert len(call.embedding_names(diffusers.SanaPipeline, model)) == 4
    assert call.embedding_names(diffusers.SanaSprintPipeline, model) == ()


def test_an_image_of_another_size_than_the_settings_is_refused():
    model = little_config(family="pixart_sigma", path=str(pipelines.little_folder("pixart_alpha")))
    check_made_size([Image.new("RGB", (64, 64))], model)
    with pytest.raises(LoraqError, match=r"made 48x64 pixels .* Set model\.height=48 model\.width"):
        check_made_size([Image.new("RGB", (64, 48))], model)


def test_settings_that_the_pipeline_refuses_are_said_with_their_values(tiny_folder):
    """They were reported as a fault of the library."""
    model = little_config(path=str(tiny_folder), call={"clean_caption": False})
    pipe = load_pipeline(model)
    with pytest.raises(LoraqError, match=r"PixArtSigmaPipeline does not take these settings: Inv"):
        image_batch(pipe, model, [Prompt("p0", "a cat")], 0)
    plain = replace(model, call={"use_resolution_binning": False, "clean_caption": False})
    pipe.transformer.register_forward_pre_hook(lambda *_: int("no number"))
    with pytest.raises(ValueError, match="invalid literal"):  # not of the settings
        image_batch(pipe, plain, [Prompt("p0", "a cat")], 0)


def test_notes_of_the_plan(tiny_folder):
    model = little_config(
        path=str(tiny_folder), dtype="bfloat16", dtypes={"vae": "float32"}, call={}
    )
    assert notes.model_notes([model, model]) == [
        "little: the denoiser runs in bfloat16, vae in float32 (model.dtypes).",
        "little: PixArtSigmaPipeline makes images of the nearest size in its own table and resizes "
        "them to 64x64 (model.call.use_resolution_binning).",
    ]
    assert notes.model_notes([little_config(path=str(tiny_folder))]) == []


def test_a_recording_serves_nearly_every_pipeline_with_a_transformer():
    """By diffusers' sources; `python -m tests.runner.text_survey` lists the exceptions."""
    found = [entry for entry in text_survey.survey("self.transformer") if entry.transformer]
    served, named = (
        sum(flags) for flags in zip(*((not e.reason, e.named) for e in found), strict=True)
    )
    assert served >= 0.9 * len(found) > 100 and named < 30
    names = {entry.name for entry in found if not entry.reason}
    kinds = {pipelines.settings(n).pipeline.__annotations__["return"] for n in pipelines.names()}
    assert kinds | {"HunyuanVideoPipeline", "ErnieImagePipeline", "Krea2Pipeline"} <= names
