"""Layers by role, on the little pipeline and on PixArt-Σ's published configuration."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from experiments.bench.make_fullsize import meta_model
from loraq import recipe
from loraq.cli import main
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.models import family_names, list_layers, load_pipeline, weights_hash
from loraq.models.loading import check_size
from loraq.models.mapped import mapped_transformer
from loraq.quantization.quantizer import quantize_model
from tests.little import little_config


@pytest.fixture(scope="module")
def full_size():
    """PixArt-Σ XL 1024 from its published numbers, on the meta device."""
    return meta_model("pixart_sigma")


def test_pixart_sigma_has_the_published_layers(full_size):
    assert sum(parameter.numel() for parameter in full_size.parameters()) == 610_856_096
    every = list_layers(full_size, "pixart_sigma", skip=())
    assert len(every) == 280
    assert sum(o * i for o, i in (layer.shape for layer in every)) == 594_542_592
    layers = list_layers(full_size, "pixart_sigma")
    assert len(layers) == 224
    assert sum(o * i for o, i in (layer.shape for layer in layers)) == 520_224_768


def test_rank_32_in_16_bits_costs_what_the_paper_set_as_standard(full_size):
    from loraq.formats import get_format
    from loraq.quantization.budget import branch_bits
    from loraq.quantization.grouping import make_units

    layers = list_layers(full_size, "pixart_sigma")
    weights = sum(o * i for o, i in (layer.shape for layer in layers))
    for share, expected in ((True, 0.635), (False, 0.698)):
        shapes = [unit.shape for unit in make_units(layers, share)]
        bits = branch_bits(shapes, 32, get_format("fp16"))
        assert bits / weights == pytest.approx(expected, abs=5e-4)


def test_layers_that_read_one_input_say_so(full_size):
    layers = {layer.name: layer for layer in list_layers(full_size, "pixart_sigma", skip=())}
    block = "transformer_blocks.3"
    qkv = {layers[f"{block}.attn1.{name}"].shares_input for name in ("to_q", "to_k", "to_v")}
    assert len(qkv) == 1
    assert layers[f"{block}.attn2.to_q"].shares_input not in qkv
    assert layers[f"{block}.attn2.to_k"].shares_input == layers[f"{block}.attn2.to_v"].shares_input
    assert layers[f"{block}.ff.net.2"].role == "ff_down"
    assert layers[f"{block}.ff.net.0.proj"].shape == (4608, 1152)


def test_skip_takes_roles_and_globs_and_refuses_what_matches_nothing(full_size):
    names = {
        layer.name for layer in list_layers(full_size, "pixart_sigma", ("transformer_blocks.0.*",))
    }
    assert len(names) == 270 and not any("blocks.0." in name for name in names)
    assert len(list_layers(full_size, "pixart_sigma", ("ff_down", "cross_k", "cross_v"))) == 196
    with pytest.raises(LoraqError, match=r"'cross_j' matches none .*cross_"):
        list_layers(full_size, "pixart_sigma", ("cross_j",))
    with pytest.raises(LoraqError, match="leaves no layer"):
        list_layers(full_size, "pixart_sigma", ("*",))


def test_an_unknown_family_answers_with_near_matches(full_size):
    with pytest.raises(LoraqError, match=r"pixart_sigm.*Did you mean 'pixart_sigma'"):
        list_layers(full_size, "pixart_sigm")
    assert {"generic", "pixart_sigma", "sana"} <= {*family_names()}


def test_a_folder_loads_and_its_hash_depends_on_the_weights_alone(tiny_folder, tmp_path):
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_folder, copy)
    model = little_config(path=str(tiny_folder))
    assert weights_hash(model) == weights_hash(little_config(name="other", path=str(copy)))
    pipe = load_pipeline(model)
    assert type(pipe).__name__ == "PixArtSigmaPipeline"
    assert len(list_layers(pipe.transformer, "pixart_sigma")) == 16
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert weights_hash(model) != weights_hash(little_config(path=str(copy)))


def test_missing_folders_are_answered_with_what_lies_beside_them(tiny_folder):
    with pytest.raises(LoraqError, match=r"model.path=.*tinny.*Similar names: tiny"):
        load_pipeline(little_config(path=str(tiny_folder.parent / "tinny")))
    with pytest.raises(LoraqError, match=r"model_index.json"):
        load_pipeline(little_config(path=str(tiny_folder / "vae")))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"clean_capton": False}, r"Unknown argument of PixArtSigmaPipeline.*clean_caption"),
        ({"num_inference_steps": 3}, r"num_inference_steps=3: set model\.steps"),
        ({"negative_prompt": "cat"}, r"negative_prompt has no effect with model.guidance=1"),
    ],
)
def test_arguments_that_would_do_nothing_are_refused(call, words, tiny_folder):
    with pytest.raises(LoraqError, match=words):
        load_pipeline(little_config(path=str(tiny_folder), guidance=1.0, call=call))


def test_a_corrupted_weights_file_is_named(tiny_folder, tmp_path):
    copy = tmp_path / "cut"
    shutil.copytree(tiny_folder, copy)
    weights = copy / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoraqError, match=r"diffusion_pytorch_model.safetensors.*corrupted"):
        load_pipeline(little_config(path=str(copy)))


def test_checksums_beside_the_weights_are_checked(tiny_folder, tmp_path):
    import hashlib

    copy = tmp_path / "summed"
    shutil.copytree(tiny_folder, copy)
    weights = copy / "vae" / "diffusion_pytorch_model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    (copy / "SHA256SUMS").write_text(f"{digest}  vae/diffusion_pytorch_model.safetensors\n")
    weights_hash(little_config(path=str(copy)))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(LoraqError, match=r"vae/diffusion_pytorch_model.safetensors' is damaged"):
        weights_hash(little_config(path=str(copy)))


def test_pickled_weights_are_not_read(tiny_folder, tmp_path):
    copy = tmp_path / "pickled"
    shutil.copytree(tiny_folder, copy)
    for path in list(copy.rglob("*.safetensors")):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(LoraqError, match="safe_serialization"):
        weights_hash(little_config(path=str(copy)))
    with pytest.raises(LoraqError, match=r"(?s)model.safetensors is missing.*safe_serialization"):
        load_pipeline(little_config(path=str(copy)))


def test_a_hub_model_without_network_fails_at_once_with_a_remedy(monkeypatch):
    import huggingface_hub

    asked = []

    def refuse(*_, **__):
        asked.append(True)
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    model = little_config(hub_id="PixArt-alpha/PixArt-Sigma-XL-2-1024-MS")
    with pytest.raises(LoraqError, match=r"(?s)model.hub_id=.*no route.*model.path=FOLDER"):
        weights_hash(model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(LoraqError, match=r"(?s)HF_HUB_OFFLINE.*model.path=FOLDER"):
        weights_hash(model)
    assert len(asked) == 1  # not again and again


@pytest.mark.parametrize("method", ["loraq_o2", "balanced"])
def test_a_mapped_transformer_gives_the_very_same_layers(method):
    """Block weights stay in the stored bf16; what is made of them has the pipeline's bits."""
    config = load_rows(["method=reference"])[0].model
    mapped, loaded = mapped_transformer(config), load_pipeline(config).transformer
    layers = list_layers(mapped, config.family, ("transformer_blocks.[1-9].*",))
    assert mapped.get_submodule(layers[0].name).weight.dtype == torch.bfloat16
    assert mapped.adaln_single.linear.weight.dtype == torch.float32
    known = ("quant.transform.smooth=balanced", "quant.statistics=weights")
    steps = "quant.branch.steps=2"
    chosen = recipe("loraq_o2", steps, *(known if method == "balanced" else ()))
    one, two = (
        quantize_model(each, layers, chosen, progress=None, family=config.family).layers
        for each in (mapped, loaded)
    )
    for name, tensors in one.items():
        assert torch.equal(tensors.weight.codes, two[name].weight.codes)
        assert torch.equal(tensors.left.codes, two[name].left.codes)
        assert torch.equal(tensors.bias_O, two[name].bias_O)


def test_a_mapped_transformer_refuses_weights_that_do_not_fit(tiny_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    model = replace(load_rows(["method=reference"])[0].model, path=str(folder))
    with pytest.raises(LoraqError, match=r"transformer.*lack 1 tensor \("):
        mapped_transformer(model)
    file.unlink()
    with pytest.raises(LoraqError, match="is missing"):
        mapped_transformer(model)


def test_data_free_quantising_loads_no_pipeline(overrides, monkeypatch):
    monkeypatch.setattr("loraq.runner.session.load_pipeline", None)
    main(["quantize", "method=loraq_o2", *overrides, "--quiet"])


def test_a_configuration_file_of_another_component_is_named(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    shutil.copy(folder / "text_encoder" / "config.json", folder / "vae" / "config.json")
    with pytest.raises(LoraqError, match=r"vae/config\.json' does not describe a AutoencoderKL"):
        check_size(little_config(path=str(folder)))
