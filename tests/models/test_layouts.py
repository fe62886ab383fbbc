"""Folders as users have them: components that two pipelines share, files of other programs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq.models import load_pipeline, weights_hash
from tests.little import little_config


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
