"""Folders and repositories as users have them: shared components, several text encoders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models import load_pipeline, resolve_folder, weights_hash
from loraq.models.contents import check_contents
from loraq.models.defaults import with_defaults
from tests import pipelines
from tests.data.hub import serving
from tests.little import little_config
from tests.models.published import NETWORK, VAE, published, shards


@pytest.fixture
def linked(tiny_folder, tmp_path) -> Path:
    """The little pipeline, whose text encoder is a link to the folder of another pipeline."""
    shutil.copytree(tiny_folder, tmp_path / "other")
    shutil.copytree(tiny_folder, tmp_path / "linked")
    shutil.rmtree(tmp_path / "linked" / "text_encoder")
    (tmp_path / "linked" / "text_encoder").symlink_to("../other/text_encoder")
    return tmp_path / "linked"


def test_a_component_that_is_a_link_is_part_of_the_models_hash(linked, tiny_folder):
    """The link's weights were left out: with another text encoder, old images were found."""
    model = little_config(path=str(linked))
    assert weights_hash(model) == weights_hash(little_config(path=str(tiny_folder)))
    file = linked / "text_encoder" / "model.safetensors"
    held = load_file(file)
    save_file({name: 2 * tensor for name, tensor in held.items()}, file, {"format": "pt"})
    assert weights_hash(model) != weights_hash(little_config(path=str(tiny_folder)))
    loaded = load_pipeline(model, without=("transformer", "vae")).text_encoder.state_dict()
    name = "encoder.final_layer_norm.weight"
    assert torch.equal(loaded[name], 2 * held[name])


def test_weights_beside_the_components_are_not_the_model(tiny_folder, tmp_path):
    """FLUX.1, SD3.5 and others hold the network again as one file, and as a node of a GUI."""
    shutil.copytree(tiny_folder, tmp_path / "copy")
    network = tmp_path / "copy" / "transformer" / "diffusion_pytorch_model.safetensors"
    for extra in ("flux1-dev.safetensors", "text_encoders/t5xxl_fp16.safetensors"):
        (tmp_path / "copy" / extra).parent.mkdir(exist_ok=True)
        shutil.copy(network, tmp_path / "copy" / extra)
    copy = little_config(path=str(tmp_path / "copy"))
    assert weights_hash(copy) == weights_hash(little_config(path=str(tiny_folder)))


def model_of(**settings) -> ModelConfig:
    """A model of which everything is read from its files."""
    given = ("height", "width", "steps", "guidance", "max_sequence_length")
    return with_defaults(ModelConfig(name="little", **dict.fromkeys(given), **settings))


@pytest.mark.parametrize("name", pipelines.names())
def test_every_component_of_a_family_is_compared_with_its_files(name):
    """Tokenizers and processors load, and the classes of all networks have the files' tensors."""
    check_contents(model_of(path=str(pipelines.little_folder(name))))


# the list of stable-diffusion-3.5-large: fp16 beside float32 in the text encoders alone
SD3 = (
    "text_encoder/model.safetensors",
    "text_encoder/model.fp16.safetensors",
    "text_encoder_2/model.safetensors",
    "text_encoder_2/model.fp16.safetensors",
    *shards("text_encoder_3/model", 2),
    *shards("text_encoder_3/model", 2, "fp16"),
    *shards(NETWORK, 2),
    f"{VAE}.safetensors",
)
WHOLE = ("sd3.5_large.safetensors", "text_encoders/t5xxl_fp16.safetensors")


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """Serve files as owner/little."""

    def opened(files):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        return serving("owner/little", files, "models")

    def pointed(hub):
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)

    return opened, pointed


def test_of_three_text_encoders_the_files_of_the_variant_are_fetched(serve):
    opened, pointed = serve
    folder = pipelines.little_folder("sd3")
    files = published(folder, SD3) | dict.fromkeys(WHOLE, b"of another program")
    with opened(files) as hub:
        pointed(hub)
        model = model_of(hub_id="owner/little", variant="fp16")
        assert (model.family, model.height) != ("auto", None)
        resolve_folder(model)
        fetched = {name for name, _ in hub.ranges if name.endswith(".safetensors")}
    weights = {name for name in SD3 if name.endswith(".safetensors")}
    plain = {name for name in weights if name.startswith("text") and ".fp16" not in name}
    assert fetched == weights - plain
    pipe = load_pipeline(model)
    for part in ("text_encoder", "text_encoder_2", "text_encoder_3", "transformer"):
        (file,) = (folder / part).glob("*.safetensors")
        name, held = max(load_file(file).items(), key=lambda pair: pair[1].numel())
        scale = 2 if part.startswith("text") else 1  # what is written into a variant's files
        loaded = getattr(pipe, part).state_dict()[name]
        assert torch.allclose(loaded.float(), scale * held.float(), rtol=1e-2, atol=1e-3), part


def test_a_second_text_encoder_that_is_pickled_is_refused_before_the_download(serve):
    opened, pointed = serve
    names = [n.replace("_2/model.fp16.safetensors", "_2/pytorch_model.bin") for n in SD3]
    names = [name for name in names if name != "text_encoder_2/model.safetensors"]
    with opened(published(pipelines.little_folder("sd3"), names)) as hub:
        pointed(hub)
        with pytest.raises(
            LoraqError, match=r"text_encoder_2/model\..*pickled.*safe_serialization"
        ):
            resolve_folder(model_of(hub_id="owner/little"))
        assert not [name for name, _ in hub.ranges if name.endswith((".safetensors", ".bin"))]


def test_a_text_encoder_of_another_pipeline_is_used_by_a_link(tmp_path):
    """FLUX.1-dev and -schnell have one T5 of 9 GB; it can lie on a disk once."""
    whole, folder = pipelines.little_folder("flux"), tmp_path / "schnell"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "text_encoder_2")
    index = json.loads((folder / "model_index.json").read_text())
    entry = index["text_encoder_2"]
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": [None, None]}))
    with pytest.raises(LoraqError, match=r"(?s)lists no text_encoder_2.*ln -s OTHER/text_encoder"):
        check_contents(model_of(path=str(folder)))
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder_2": entry}))
    (folder / "text_encoder_2").symlink_to(whole / "text_encoder_2")
    model = model_of(path=str(folder))
    check_contents(model)
    (folder / "model_index.json").write_text((whole / "model_index.json").read_text())
    assert weights_hash(model) == weights_hash(model_of(path=str(whole)))
