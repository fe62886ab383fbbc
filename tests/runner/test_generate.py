"""Generation: the pipeline's images, initial latents from name and seed, resume by batch."""

from __future__ import annotations

import errno
import os
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from loraq import recipe
from loraq.config import GenerateConfig, ModelConfig
from loraq.data import Prompt, seed_of_name
from loraq.errors import DiskFullError, LoraqError
from loraq.models import list_layers, load_pipeline
from loraq.quantization.quantizer import quantize_model
from loraq.runner import generate as generation
from loraq.runner.trajectories import record_forwards
from loraq.utils import batch_invariance
from loraq.utils.console import show_messages
from tests.damage import flip_bit
from tests.little import little_config

PROMPTS = [Prompt(f"p{i}", f"a {colour} cat") for i, colour in enumerate(["red", "green", "blue"])]


@pytest.fixture(scope="module")
def model(tiny_folder) -> ModelConfig:
    return little_config(path=str(tiny_folder))


@pytest.fixture(scope="module")
def pipe(model):
    return load_pipeline(model)


def pixels(path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(int)


def test_images_are_those_of_the_unmodified_pipeline(pipe, model, tmp_path):
    import torch

    made = generation.generate_images(pipe, model, PROMPTS[:1], GenerateConfig(), tmp_path, None)
    own = pipe(
        PROMPTS[0].prompt,
        num_inference_steps=2,
        guidance_scale=4.5,
        height=64,
        width=64,
        max_sequence_length=8,
        use_resolution_binning=False,
        clean_caption=False,
        generator=torch.Generator("cpu").manual_seed(seed_of_name("p0")),
    ).images[0]
    assert made[0].name == "p0.png"
    assert (pixels(made[0]) == np.asarray(own).astype(int)).all()


@pytest.mark.parametrize("invariant", [None, False])
@pytest.mark.parametrize("quantized", [False, True])
def test_batch_size_changes_neither_initial_latents_nor_images(
    pipe, model, tmp_path, monkeypatch, quantized, invariant
):
    """Also on processors whose matrix products depend on the batch size (`batch_invariance`)."""
    import torch

    if invariant is not None:
        monkeypatch.setattr(batch_invariance, "row_invariant", lambda: invariant)
    layers = list_layers(pipe.transformer, model.family, ())
    packed = quantize_model(pipe.transformer, layers, recipe("loraq_o2"), progress=None)
    latents = {}
    if quantized:
        packed.apply(pipe.transformer)
    try:
        for size in (1, 3):
            batches = [PROMPTS[i : i + size] for i in range(0, 3, size)]
            start = [
                pipe.prepare_latents(
                    len(batch), 4, 64, 64, torch.float32, "cpu", generation.generators(batch, 0)
                )
                for batch in batches
            ]
            latents[size] = torch.cat(start)
            settings, folder = GenerateConfig(batch_size=size), tmp_path / str(size)
            folder.mkdir()
            generation.generate_images(pipe, model, PROMPTS, settings, folder, None)
    finally:
        if quantized:
            packed.revert(pipe.transformer)
    assert torch.equal(latents[1], latents[3])
    for prompt in PROMPTS:
        one, three = (pixels(tmp_path / size / f"{prompt.name}.png") for size in ("1", "3"))
        assert (one == three).all()


def test_prompts_and_seeds_make_different_images(pipe, model, tmp_path):
    for seed in (0, 1):
        settings = GenerateConfig(batch_size=3, seed=seed)
        folder = tmp_path / str(seed)
        folder.mkdir()
        generation.generate_images(pipe, model, PROMPTS, settings, folder, None)
    images = [pixels(path) for path in sorted(tmp_path.glob("*/*.png"))]
    assert all((images[i] != images[j]).any() for i in range(len(images)) for j in range(i))


BIASES = {  # what overflows → where its bias is
    "the text's embeddings are": lambda pipe: pipe.text_encoder.encoder.final_layer_norm.weight,
    "the latents at step 1 of 2 are": lambda pipe: pipe.transformer.proj_out.bias,
    "the latents are finite, the decoder's output is": lambda pipe: pipe.vae.decoder.conv_out.bias,
}
REMEDIES = {
    "the text's embeddings are": r"\+model\.dtypes=\{text_encoder: bfloat16\} \(or float32\)",
    "the latents at step 1 of 2 are": r"model\.dtype=bfloat16",
    "the latents are finite, the decoder's output is": r"model\.dtypes=\{vae: bfloat16\}",
}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize("where", BIASES)
def test_images_that_are_not_finite_are_refused_with_what_overflowed(
    where, value, pipe, model, tmp_path
):
    """Infinite pixels would be clamped to white, NaN saved as black."""
    import torch

    bias = BIASES[where](pipe)
    kept = bias.detach().clone()
    half = replace(model, dtype="float16")
    hooks = len(pipe.transformer._forward_hooks), len(pipe.vae.decoder._forward_hooks)
    try:
        with torch.no_grad():
            bias[0] = float(value)
        with pytest.raises(LoraqError, match=rf"'p0'(.|\n)*{where}(.|\n)*{REMEDIES[where]}"):
            generation.generate_images(pipe, half, PROMPTS[:1], GenerateConfig(), tmp_path, None)
        if "decoder" not in where:
            with pytest.raises(LoraqError, match=where):
                generation.image_batch(pipe, model, PROMPTS[:2], 0, "latent")
            with pytest.raises(LoraqError, match=where):
                record_forwards(pipe, model, PROMPTS[:2], 0, 2)
    finally:
        with torch.no_grad():
            bias.copy_(kept)
    assert not list(tmp_path.glob("*.png"))
    assert hooks == (len(pipe.transformer._forward_hooks), len(pipe.vae.decoder._forward_hooks))


def test_an_overflow_in_a_later_step_is_found_there(pipe, model, tmp_path):
    import torch

    calls = []

    def second(_module, _args, output):
        calls.append(1)
        return (torch.full_like(output[0], float("inf")),) if len(calls) % 3 == 2 else None

    handle = pipe.transformer.register_forward_hook(second)
    try:
        with pytest.raises(LoraqError, match="the latents at step 2 of 3 are NaN or infinite"):
            generation.image_batch(pipe, replace(model, steps=3), PROMPTS[:2], 0)
    finally:
        handle.remove()


def test_images_of_one_colour_are_said(pipe, model, tmp_path, caplog):
    import torch

    conv = pipe.vae.decoder.conv_out
    kept = conv.weight.detach().clone()
    try:
        with torch.no_grad():
            conv.weight.zero_()
        generation.generate_images(pipe, model, PROMPTS[:2], GenerateConfig(), tmp_path, None)
    finally:
        with torch.no_grad():
            conv.weight.copy_(kept)
    assert "2 of 2 images of the batch have one colour only (p0, p1)" in caplog.text
    caplog.clear()
    generation.generate_images(pipe, model, PROMPTS[2:], GenerateConfig(), tmp_path, None)
    assert not caplog.text


def test_a_product_that_another_process_has_finished_is_not_made_again(pipe, model, tmp_path):
    """The other process has already renamed the partial folder."""
    paths = generation.generate_images(
        pipe, model, PROMPTS, GenerateConfig(), tmp_path / "gone", None
    )
    assert len(paths) == len(PROMPTS) and not any(tmp_path.iterdir())


def test_finished_batches_are_not_remade_and_damaged_ones_are(
    pipe, model, tmp_path, monkeypatch, capsys
):
    show_messages()
    made = []
    original = generation.image_batch

    def counted(pipe, model, prompts, seed, **options):
        made.append([prompt.name for prompt in prompts])
        if len(made) == 2:
            raise KeyboardInterrupt
        return original(pipe, model, prompts, seed, **options)

    monkeypatch.setattr(generation, "image_batch", counted)
    settings = GenerateConfig(batch_size=1)
    with pytest.raises(KeyboardInterrupt):
        generation.generate_images(pipe, model, PROMPTS, settings, tmp_path, None)
    generation.generate_images(pipe, model, PROMPTS, settings, tmp_path, None)
    assert made == [["p0"], ["p1"], ["p1"], ["p2"]]
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    (tmp_path / "p1.png").write_bytes(before["p1.png"][:50])
    generation.generate_images(pipe, model, PROMPTS, settings, tmp_path, None)
    assert made[4:] == [["p1"]]
    assert f"'{tmp_path / 'p1.png'}' does not match" in capsys.readouterr().err
    flip_bit(tmp_path / "batches" / "00002.json", -5)  # a digit of the seconds
    generation.generate_images(pipe, model, PROMPTS, settings, tmp_path, None)
    assert made[5:] == [["p2"]] and "00002.json' does not match" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == before


def test_a_full_disk_leaves_only_complete_images(pipe, model, tmp_path, monkeypatch):
    synced = os.fsync
    calls = []

    def filling(handle):
        calls.append(handle)
        if len(calls) > 4:  # the first image, its batch's file and their checksums fit
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(handle)

    monkeypatch.setattr(os, "fsync", filling)
    settings = GenerateConfig(batch_size=1)
    with pytest.raises(DiskFullError, match=r"p1\.png.*it resumes"):
        generation.generate_images(pipe, model, PROMPTS, settings, tmp_path, None)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(path.name.startswith(".") for path in files)
    for path in tmp_path.glob("*.png"):
        Image.open(path).load()
    monkeypatch.setattr(os, "fsync", synced)
    assert len(generation.generate_images(pipe, model, PROMPTS, settings, tmp_path, None)) == 3


def test_activations_too_large_for_the_scales_are_traced_to_their_layer(model):
    """A layer whose input exceeds 7·65504 needs int4 activations with scales in bfloat16."""
    factor = 2.0**21
    pipe = load_pipeline(model)
    attention = pipe.transformer.transformer_blocks[1].attn1
    attention.to_v.weight.data *= factor
    attention.to_v.bias.data *= factor
    attention.to_out[0].weight.data /= factor  # the same function
    layers = list_layers(pipe.transformer, model.family)
    for scale in ("fp16", "bf16"):
        formats = [f"quant.activation.scale={scale}", "quant.weight.scale=bf16"]
        packed = quantize_model(pipe.transformer, layers, recipe("rtn", *formats), progress=None)
        with packed.applied(pipe.transformer):
            if scale == "bf16":
                assert len(generation.batch_images(pipe, model, PROMPTS[:1], 0)) == 1
                continue
            words = r"1\.attn1\.to_out\.0' reaches .*4\.585e\+05.*quant\.activation\.scale=bf16"
            with pytest.raises(LoraqError, match=words):
                generation.batch_images(pipe, model, PROMPTS[:1], 0)
