"""Packed checkpoints of every family, on the transformers of their little pipelines."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel

import loraq
from loraq.diffusers_quantizer import LoRaQConfig
from loraq.models import Layer
from loraq.models.denoisers import Experts, denoiser_of, dtype_of, parts
from loraq.models.example_inputs import example_inputs
from loraq.models.files import components
from loraq.quantization.quantizer import quantize_model
from tests import pipelines

RECIPE = ("loraq_o2", "quant.branch.rank=4", "quant.branch.steps=2", "quant.branch.budget=null")


@cache
def transformer_class(name: str) -> Any:
    """The class of a little pipeline's transformer."""
    folder = pipelines.little_folder(name)
    return getattr(diffusers, components(folder)["transformer"][1])


@torch.no_grad()
def outputs(transformer) -> list[torch.Tensor]:
    """Of one forward."""
    found = transformer(**example_inputs(transformer), return_dict=False)[0]
    return list(found) if isinstance(found, list) else [found]


@pytest.mark.parametrize("name", pipelines.names())
def test_a_family_is_quantised_while_it_is_loaded_saved_and_read_back(name, tmp_path):
    """The packed layers of `loraq.quantize`, and the same model from its files."""
    folder, kind = pipelines.little_folder(name), transformer_class(name)
    pipe = pipelines.build(name)
    made = loraq.quantize(pipe, loraq.recipe(*RECIPE), progress=False)
    nets = parts(denoiser_of(pipe)).values()
    packed = [n for net in nets for n in net.state_dict() if n.endswith(".weight_codes")]
    assert len(packed) == len(made.layers) >= 4
    net, settings = pipe.transformer, LoRaQConfig(*RECIPE)
    loading = kind.from_pretrained(folder / "transformer", quantization_config=settings)
    loading.save_pretrained(tmp_path)
    loaded, state = kind.from_pretrained(tmp_path), net.state_dict()
    for other in (loading, loaded):
        held = other.state_dict()
        assert held.keys() == state.keys()
        assert all(torch.equal(tensor, held[name]) for name, tensor in state.items())
    for one, two in zip(outputs(net), outputs(loaded), strict=True):
        assert one.isfinite().all() and torch.equal(one, two)


def test_what_a_class_keeps_in_float32_stays_so_in_a_packed_checkpoint(tmp_path):
    """Wan's time embedding and norms were read in the model's dtype, so that images differed."""
    folder = pipelines.little_folder("wan") / "transformer"
    net = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    layer = Layer("blocks.0.ffn.net.2", "ff_down", (48, 112), "blocks.0.ff.down")
    quantize_model(net, [layer], loraq.recipe("rtn"), progress=None).apply(net)
    assert next(net.parameters()).dtype == torch.float32
    assert dtype_of(net) == dtype_of(Experts({"transformer": net})) == torch.bfloat16
    net.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    assert torch.float32 in types.values() and torch.bfloat16 in types.values()
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == types
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in net.state_dict().items())
