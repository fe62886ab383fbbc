"""A folder is a model only if it holds every tensor and file of it, and nothing of another."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq import recipe
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.models import list_layers, load_pipeline, resolve_folder, weights_hash
from loraq.models.contents import check_contents
from loraq.models.files import used_files
from loraq.models.mapped import mapped_transformer
from loraq.quantization.quantizer import quantize_model
from loraq.runner.estimate import dry_run
from loraq.runner.experiment import run
from tests.data.hub import COMMIT, serving
from tests.little import little_config

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
TO_K = "transformer_blocks.0.attn1.to_k.weight"


@pytest.fixture
def copy(tiny_folder, tmp_path):
    """A copy of the little pipeline to damage."""
    shutil.copytree(tiny_folder, tmp_path / "copy")
    return tmp_path / "copy"


def change(file: Path, **tensors: torch.Tensor | None) -> None:
    """Replace tensors of a safetensors file; None removes one. `__` in a name is a dot."""
    held = load_file(file)
    for name, tensor in tensors.items():
        held.pop(name, None) if tensor is None else held.update({name: tensor})
    save_file(held, file)


@pytest.mark.parametrize(
    ("file", "name", "tensor", "words"),
    [
        (TEXT, "encoder.final_layer_norm.weight", None, "text_encoder.*lack 1 tensor"),
        (VAE, "decoder.conv_in.bias", None, "vae.*lack 1 tensor"),
        (TRANSFORMER, TO_K, None, "transformer.*lack 1 tensor"),
        (TRANSFORMER, "guidance.weight", torch.zeros(3), "transformer.*does not have"),
        (TRANSFORMER, TO_K, torch.zeros(64, 32), "transformer.*do not fit config.json"),
        (TEXT, "encoder.final_layer_norm.weight", torch.zeros(1), "text_encoder.*do not fit"),
        (TRANSFORMER, TO_K, torch.zeros(64, 64).to(torch.float8_e4m3fn), "stored as F8_E4M3"),
        (TEXT, "extra.scale", torch.zeros(4, dtype=torch.uint8), "text_encoder.*stored as U8"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_the_plan(
    file, name, tensor, words, copy, overrides
):
    """A missing tensor of the text encoder was drawn at random, and the run went on."""
    change(copy / file, **{name: tensor})
    match = f"(?=.*{re.escape(name)}).*{words}"
    with pytest.raises(LoraqError, match=match):
        dry_run([*overrides, "method=rtn", f"model.path={copy}"])
    with pytest.raises(LoraqError, match=match):
        load_pipeline(little_config(path=str(copy)))
    if file == TRANSFORMER:
        with pytest.raises(LoraqError, match=match):
            mapped_transformer(little_config(path=str(copy)))


def test_a_tied_tensor_is_there_under_either_name(tiny_folder, copy):
    held = load_file(copy / TEXT)
    (name,) = held.keys() & {"shared.weight", "encoder.embed_tokens.weight"}
    (other,) = {"shared.weight", "encoder.embed_tokens.weight"} - {name}
    change(copy / TEXT, **{name: None, other: held[name]})
    text = load_pipeline(little_config(path=str(copy)), without=("transformer", "vae")).text_encoder
    assert torch.equal(text.shared.weight, held[name])
    assert text.encoder.embed_tokens.weight is text.shared.weight
    change(copy / TEXT, **{other: None})
    with pytest.raises(LoraqError, match=r"lack . tensors? \(.*(shared|embed_tokens)"):
        check_contents(little_config(path=str(copy)))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("../../blobs/of-an-interrupted-download")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (TEXT, Path.unlink, "text_encoder/model.safetensors is missing.*safe_serialization"),
        (TEXT, empty, "text_encoder/model.safetensors is empty"),
        (VAE, dangling, "vae/.*link to a file that does not exist"),
        (TRANSFORMER, pointer, "transformer/.*git lfs pull"),
        (TRANSFORMER, cut, "transformer/.*truncated"),
        ("tokenizer/tokenizer.json", pointer, "tokenizer/tokenizer.json is a pointer"),
        ("tokenizer/tokenizer.json", Path.unlink, "tokenizer/tokenizer.json is missing"),
        ("vae/config.json", Path.unlink, "vae/config.json is missing"),
        ("vae/config.json", lambda p: p.write_text("{"), "vae/config.json' cannot be read"),
        ("scheduler/scheduler_config.json", Path.unlink, "scheduler_config.json is missing"),
        ("model_index.json", pointer, "model_index.json.* is a pointer"),
        ("model_index.json", lambda p: p.write_text("[]"), "model_index.json.* no JSON object"),
    ],
)
def test_a_damaged_file_is_named_with_what_is_wrong(file, damage, words, copy, overrides):
    damage(copy / file)
    with pytest.raises(LoraqError, match=f"(?s){words}"):
        dry_run([*overrides, "method=rtn", f"model.path={copy}"])
    with pytest.raises(LoraqError, match=f"(?s){words}"):
        load_pipeline(little_config(path=str(copy)))


@pytest.mark.parametrize("index", [{"a": "gone-00001-of-00001.safetensors"}, {}, None])
def test_an_index_that_names_absent_files_is_refused(index, copy):
    place = copy / f"{TRANSFORMER}.index.json"
    place.write_text("{" if index is None else json.dumps({"weight_map": index}))
    words = {0: "has no weight_map", 1: "gone-00001.*is missing"}.get(
        -1 if index is None else len(index), "cannot be read"
    )
    with pytest.raises(LoraqError, match=words):
        check_contents(little_config(path=str(copy)), ("transformer",))


@pytest.mark.parametrize(
    ("file", "old", "new", "words"),
    [
        ("model_index.json", "PixArtSigmaPipeline", "SanaPipeline", "is a SanaPipeline"),
        ("model_index.json", "AutoencoderKL", "AutoencoderDC", "names AutoencoderDC as vae"),
        ("model_index.json", "T5EncoderModel", "BertModel", "names BertModel as text_encoder"),
        ("model_index.json", "AutoencoderKL", "MyAutoencoder", "MyAutoencoder.*not installed"),
        ("model_index.json", '"vae"', '"decoder"', "lists no vae"),
        ("vae/config.json", "AutoencoderKL", "AutoencoderDC", "is that of a AutoencoderDC"),
        (
            "transformer/config.json",
            '"caption_channels": 32',
            '"caption_channels": 48',
            "d_model=32",
        ),
        ("vae/config.json", '"latent_channels": 4', '"latent_channels": 16', "in_channels=4"),
        ("text_encoder/config.json", '"t5"', '"umt5"', "is that of a umt5"),
        ("text_encoder/config.json", '"d_kv": 16', '"d_kv": "wide"', "does not describe a T5"),
    ],
)
def test_another_model_at_the_path_is_refused_in_the_plan(file, old, new, words, copy, overrides):
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    with pytest.raises(LoraqError, match=words):
        dry_run([*overrides, "method=rtn", f"model.path={copy}"])


def test_files_of_earlier_versions_are_the_model(copy):
    """Published PixArt files name the class Transformer2DModel and hold what diffusers computes."""
    for file in ("model_index.json", "transformer/config.json"):
        text = (copy / file).read_text()
        (copy / file).write_text(text.replace("PixArtTransformer2DModel", "Transformer2DModel"))
    held = load_file(copy / TRANSFORMER)
    more = {"pos_embed.pos_embed": torch.zeros(1, 16, 64)}
    change(copy / TRANSFORMER, **more, **{"caption_projection.y_embedding": torch.zeros(120, 32)})
    model = little_config(path=str(copy))
    loaded, mapped = load_pipeline(model).transformer, mapped_transformer(model)
    assert type(loaded) is type(mapped) and type(loaded).__name__ == "PixArtTransformer2DModel"
    for transformer in (loaded, mapped):
        assert torch.equal(transformer.state_dict()[TO_K], held[TO_K])
        assert transformer.pos_embed.pos_embed.abs().sum() > 0


def test_quantising_needs_the_transformer_alone(copy, overrides):
    from loraq.cli import main

    (copy / TEXT).unlink()
    settings = ["method=rtn", *overrides, f"model.path={copy}"]
    assert main(["quantize", *settings, "--quiet"]) in (None, 0)
    with pytest.raises(LoraqError, match=r"model.safetensors is missing"):
        run(settings, progress=False)


def with_variant(folder: Path, variant: str) -> None:
    """Change every weight file's name as save_pretrained(variant=…) does."""
    for path in list(folder.rglob("*.safetensors")):
        path.rename(path.with_suffix(f".{variant}.safetensors"))


def test_a_variants_files_are_read_and_are_in_the_keys(tiny_folder, copy):
    """fp16 files beside others: with model.variant=fp16, those and nothing else are read."""
    plain = little_config(path=str(copy))
    halved = little_config(path=str(copy), variant="fp16")
    with pytest.raises(LoraqError, match=r"variant=fp16.*Variants of this model: none"):
        weights_hash(halved)
    before = weights_hash(plain)
    double = {name: 2 * tensor for name, tensor in load_file(copy / TRANSFORMER).items()}
    save_file(double, (copy / TRANSFORMER).with_suffix(".fp16.safetensors"))
    found = weights_hash(halved)
    assert found != before and weights_hash(plain) != found
    for transformer in (load_pipeline(halved).transformer, mapped_transformer(halved)):
        assert torch.equal(transformer.state_dict()[TO_K], double[TO_K])
    for transformer in (load_pipeline(plain).transformer, mapped_transformer(plain)):
        assert torch.equal(transformer.state_dict()[TO_K], double[TO_K] / 2)
    (copy / TRANSFORMER).unlink()  # the file that is not read is not part of the hash
    assert weights_hash(halved) == found
    with pytest.raises(LoraqError, match=r"variant=bf16.*Variants of this model: fp16"):
        weights_hash(little_config(path=str(copy), variant="bf16"))


def test_a_variant_is_part_of_the_rows_keys(tiny_folder, copy, overrides):
    from loraq.runner.product_keys import make_row

    with_variant(copy, "fp16")
    settings = ["method=rtn", *overrides, f"model.path={copy}", "model.variant=fp16"]
    row = make_row(load_rows(settings)[-1])
    assert (
        row.keys["quantised"]
        != make_row(load_rows(["method=rtn", *overrides])[-1]).keys["quantised"]
    )


def test_files_of_other_variants_are_left_out():
    names = [
        "model_index.json",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "transformer/diffusion_pytorch_model.fp16.safetensors",
        "transformer/diffusion_pytorch_model.bf16.safetensors",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.bf16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "whole_model.fp16.safetensors",
    ]
    parts = ("text_encoder", "transformer", "vae")
    assert used_files(names, parts, "fp16") == [names[i] for i in (0, 2, 3, 4, 8)]


@pytest.fixture
def hub_cache(tmp_path, tiny_folder, monkeypatch):
    """A hub cache with the little pipeline as owner/little, without access to a hub."""
    repository = tmp_path / "cache" / "models--owner--little"
    shutil.copytree(tiny_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return repository / "snapshots" / COMMIT


def test_a_partial_snapshot_of_the_hub_cache_is_not_the_model(hub_cache):
    model = little_config(hub_id="owner/little")
    assert resolve_folder(model) == hub_cache
    check_contents(model)
    (hub_cache / TEXT).unlink()
    dangling(hub_cache / VAE)
    words = "snapshot.*incomplete: text_encoder/model.safetensors is missing; vae/.*is a link"
    with pytest.raises(LoraqError, match=f"(?s){words}.*hf download owner/little"):
        resolve_folder(model)
    (hub_cache / "model_index.json").unlink()
    with pytest.raises(LoraqError, match=r"model_index.json is missing"):
        resolve_folder(model)


def test_missing_files_of_a_snapshot_are_fetched(hub_cache, tiny_folder, monkeypatch):
    """Of the repository's weights only the variant's are downloaded, into the same snapshot."""
    files = {
        path.relative_to(tiny_folder).as_posix(): path.read_bytes()
        for path in tiny_folder.rglob("*")
        if path.is_file()
    }
    files[TEXT.replace("model.", "model.fp16.")] = files[TEXT]
    shutil.rmtree(hub_cache / "text_encoder")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with serving("owner/little", files, "models") as hub:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        found = resolve_folder(little_config(hub_id="owner/little", variant="fp16"))
    assert found == hub_cache
    there = {path.name for path in (hub_cache / "text_encoder").iterdir()}
    assert there == {"config.json", "model.fp16.safetensors"}


ADALN = "adaln_single.linear.bias"


@pytest.mark.parametrize(
    ("file", "name", "value", "dtype", "words"),
    [
        (TEXT, "encoder.final_layer_norm.weight", torch.nan, "float32", "text_encoder"),
        (VAE, "decoder.conv_in.bias", torch.inf, "float32", "vae"),
        (TRANSFORMER, TO_K, torch.nan, "float32", "transformer"),
        (TRANSFORMER, ADALN, -torch.inf, "float32", "transformer"),
        (TRANSFORMER, ADALN, 1e5, "float16", "(?=.*use bfloat16)transformer"),
    ],
)
def test_a_value_that_is_not_finite_is_named_on_loading(file, name, value, dtype, words, copy):
    tensor = load_file(copy / file)[name]
    tensor.flatten()[3] = value
    change(copy / file, **{name: tensor})
    model = little_config(path=str(copy), dtype=dtype)
    match = rf"{words}\.{name}': 1 of {tensor.numel()} values are NaN or infinite"
    with pytest.raises(LoraqError, match=match):
        load_pipeline(model)
    if name == ADALN:  # of a mapped transformer, weights are checked when they are quantised
        with pytest.raises(LoraqError, match=match):
            mapped_transformer(model)


def test_a_weight_that_moments_follow_from_is_named_before_they_are_used(copy):
    """to_v's NaN would be in the moments of the next layer's input."""
    name = "transformer_blocks.0.attn1.to_v.weight"
    tensor = load_file(copy / TRANSFORMER)[name]
    tensor[1, 1] = torch.nan
    change(copy / TRANSFORMER, **{name: tensor})
    transformer = mapped_transformer(little_config(path=str(copy)))
    layers = list_layers(transformer, "pixart_sigma", ("transformer_blocks.0.attn1.to_v",))
    chosen = recipe("rtn", "quant.transform.smooth=balanced", "quant.statistics=weights")
    with pytest.raises(LoraqError, match=f"'{name}': 1 of 4096 values"):
        quantize_model(transformer, layers, chosen, progress=None, family="pixart_sigma")
