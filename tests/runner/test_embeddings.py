"""Text embeddings: bit-identical to the pipeline's, computed once, read without a text encoder."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraq.compose import load_rows
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models import load_pipeline
from loraq.runner import embeddings, session
from loraq.runner.embeddings import read_embeddings, write_embeddings
from loraq.runner.experiment import run
from loraq.runner.generate import image_batch
from loraq.utils import batch_invariance
from loraq.utils.console import show_messages
from tests.damage import flip_bit

TEXT, IMAGE = ("text_encoder",), ("transformer", "vae")

PROMPTS = [Prompt("p0", "a red cat"), Prompt("p1", "one"), Prompt("p2", "a blue fish a green dog")]
FAMILIES = {
    "pixart": ("tiny_folder", "tiny_pixart", "{use_resolution_binning:false,clean_caption:false}"),
    "sana": (
        "sana_folder",
        "tiny_sana",
        "{use_resolution_binning:false,clean_caption:false,complex_human_instruction:[red cat]}",
    ),
}


@pytest.fixture(params=sorted(FAMILIES))
def model(request):
    folder, name, call = FAMILIES[request.param]
    path = f"model.path={request.getfixturevalue(folder)}"
    size = ("model.height=64", "model.width=64", "model.steps=2", "model.max_sequence_length=24")
    own = ("model.hub_id=null", "model.dtype=float32", f"model.call={call}")
    return load_rows([f"model={name}", path, *size, *own])[0].model


@pytest.fixture(autouse=True)
def together(monkeypatch):
    """Encode a batch in one call, as the pipeline does."""
    monkeypatch.setattr(batch_invariance, "batch_limit", lambda images, _device: images)


def encoder(pipe, model):
    return functools.partial(embeddings.encode_prompts, pipe, model)


@pytest.mark.parametrize("guidance", [4.5, 1.0])
def test_images_equal_those_of_the_pipeline_that_encodes_prompts(model, tmp_path, guidance):
    model = replace(model, guidance=guidance)
    pipe = load_pipeline(model)
    write_embeddings(encoder(pipe, model), PROMPTS, 2, tmp_path)
    for number, batch in enumerate((PROMPTS[:2], PROMPTS[2:])):
        text = read_embeddings(tmp_path, number, "cpu")
        wanted = image_batch(pipe, model, batch, 0, "pt")
        bare = load_pipeline(model, without=TEXT)
        assert bare.text_encoder is None
        assert torch.equal(image_batch(bare, model, batch, 0, "pt", text), wanted)
        other = {name: tensor.flip(1) for name, tensor in text.items()}
        assert not torch.equal(image_batch(bare, model, batch, 0, "pt", other), wanted)


def test_a_negative_prompt_is_encoded_like_the_pipeline_does(model, tmp_path):
    model = replace(model, call={**model.call, "negative_prompt": "green dog"})
    pipe = load_pipeline(model)
    write_embeddings(encoder(pipe, model), PROMPTS, 3, tmp_path)
    wanted = image_batch(pipe, model, PROMPTS, 0, "pt")
    assert torch.equal(
        image_batch(pipe, model, PROMPTS, 0, "pt", read_embeddings(tmp_path, 0, "cpu")),
        wanted,
    )


def test_masked_tokens_are_not_stored(model, tmp_path):
    pipe = load_pipeline(model, without=IMAGE)
    assert pipe.transformer is None and pipe.vae is None
    write_embeddings(encoder(pipe, model), PROMPTS, 3, tmp_path)
    made, held = (
        embeddings.encode_prompts(pipe, model, PROMPTS),
        read_embeddings(tmp_path, 0, "cpu"),
    )
    assert sorted(made) == sorted(held) == sorted(embeddings.embedding_names(pipe, model))
    for name, tensor in made.items():
        masked = f"{name.removesuffix('_attention_mask').removesuffix('_embeds')}_attention_mask"
        shown = made[masked] > 0
        last = int(shown.any(0).nonzero().max()) + 1 if shown.any() else 24
        assert held[name].shape == tensor.shape and held[name].dtype == tensor.dtype
        assert torch.equal(held[name][:, :last], tensor[:, :last])
        assert not held[name][:, last:].any()
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    assert size < 0.8 * sum(tensor.nbytes for tensor in made.values())


def test_an_all_zero_mask_keeps_every_token(model, tmp_path, monkeypatch):
    pipe = load_pipeline(model, without=IMAGE)
    blind = {
        n: t * 0 if "mask" in n else t
        for n, t in embeddings.encode_prompts(pipe, model, PROMPTS).items()
    }
    monkeypatch.setattr(embeddings, "encode_prompts", lambda *_: blind)
    write_embeddings(encoder(pipe, model), PROMPTS, 3, tmp_path)
    held = read_embeddings(tmp_path, 0, "cpu")
    assert all(torch.equal(held[name], tensor) for name, tensor in blind.items())


def test_finished_batches_are_kept_and_damaged_ones_remade(model, tmp_path, monkeypatch, capsys):
    pipe = load_pipeline(model, without=IMAGE)
    write_embeddings(encoder(pipe, model), PROMPTS, 1, tmp_path)
    show_messages()
    files = sorted(tmp_path.glob("*.safetensors"))
    before = [file.read_bytes() for file in files]
    files[0].write_bytes(before[0][:-100])
    with pytest.raises(LoraqError, match=rf"{files[0].name}' is damaged.*delete it"):
        read_embeddings(tmp_path, 0, "cpu")
    files[1].unlink()
    made, original = [], embeddings.encode_prompts
    monkeypatch.setattr(embeddings, "encode_prompts", lambda *a: made.append(a[2]) or original(*a))
    write_embeddings(encoder(pipe, model), PROMPTS, 1, tmp_path)
    assert made == [PROMPTS[:1], PROMPTS[1:2]]
    flip_bit(files[2], -9)
    write_embeddings(encoder(pipe, model), PROMPTS, 1, tmp_path)
    assert made[2:] == [PROMPTS[2:]]
    assert [file.read_bytes() for file in files] == before
    said = capsys.readouterr().err
    assert [str(file) in said for file in files] == [True, False, True]


def test_the_text_encoder_is_read_once_for_all_methods_and_step_counts(overrides, monkeypatch):
    loads, original = [], session.load_pipeline

    def load(model, device, without, **given):
        loads.append(tuple(without))
        return original(model, device, without, **given)

    monkeypatch.setattr(session, "load_pipeline", load)
    run(["method=rtn", *overrides], progress=False)
    # embeddings, images, then the embeddings of the measuring captions
    assert loads == [IMAGE, TEXT, IMAGE]
    loads.clear()
    run(["method=rtn", "format@quant.weight=int8", *overrides], progress=False)
    assert loads == [TEXT]
    folder = Path(overrides[-1].removeprefix("output=")) / "embeddings"
    run(["method=reference", *overrides, "model.steps=1"], progress=False)
    assert loads == [TEXT] * 2 and len([p for p in folder.iterdir() if p.is_dir()]) == 1
