"""The networks of a pipeline that are quantised, one or several."""

from __future__ import annotations

import pytest
from diffusers import WanPipeline, WanTransformer3DModel
from torch import nn

from loraq.errors import LoraqError
from loraq.models.component_names import denoiser_names
from loraq.models.denoisers import Experts, denoiser_of, joined, of_part, parts


def test_denoisers_are_found_by_their_names_among_all_components():
    listed = ("scheduler", "transformer_2", "text_encoder", "vae", "transformer")
    assert denoiser_names(listed) == ("transformer", "transformer_2")
    assert denoiser_names(("unet", "vae")) == ()


def wan(**second: nn.Module | None) -> WanPipeline:
    """A pipeline of Wan's class with only its transformers."""

    def transformer() -> WanTransformer3DModel:
        sizes = {"num_attention_heads": 1, "attention_head_dim": 12, "num_layers": 1}
        widths = {"in_channels": 4, "out_channels": 4, "text_dim": 8, "ffn_dim": 16}
        return WanTransformer3DModel(**sizes, **widths, freq_dim=8)

    parts = {"transformer": transformer(), "transformer_2": transformer(), **second}
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, **parts)


def test_one_transformer_is_itself_and_two_are_experts():
    pipe = wan(transformer_2=None)  # Wan 2.2 5B
    assert denoiser_of(pipe) is pipe.transformer
    assert parts(pipe.transformer) == {"": pipe.transformer}
    pipe = wan()
    both = denoiser_of(pipe)
    assert isinstance(both, Experts)
    assert parts(both) == {"transformer": pipe.transformer, "transformer_2": pipe.transformer_2}
    assert both.get_submodule("transformer_2.blocks.0") is pipe.transformer_2.blocks[0]


def test_a_pipeline_without_a_transformer_is_refused():
    with pytest.raises(LoraqError, match="WanPipeline has no transformer"):
        denoiser_of(wan(transformer=None, transformer_2=None))


def test_names_of_a_part():
    assert joined("", "blocks.0") == "blocks.0"
    names = {joined("transformer_2", "blocks.0"): 2, joined("transformer", "blocks.0"): 1}
    assert of_part(names, "transformer_2") == {"blocks.0": 2}
    assert of_part({"blocks.0": 1}, "") == {"blocks.0": 1}
    assert isinstance(
        Experts({"transformer": nn.Linear(2, 2)}).get_submodule("transformer"), nn.Linear
    )
