"""Packed checkpoints of every family, on the transformers of their little pipelines."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import pytest
import torch
from diffusers import WanTransformer3DModel

from loraq.compose import recipe
from loraq.diffusers_quantizer import LoRaQConfig
from loraq.models import Layer, list_layers
from loraq.models.denoisers import Experts, dtype_of
from loraq.models.example_inputs import example_inputs
from loraq.models.files import components
from loraq.models.layers import family_of, recipe_for
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
    """The same packed layers as of a loaded transformer, and the same model from its files."""
    folder, kind = pipelines.little_folder(name) / "transformer", transformer_class(name)
    net = kind.from_pretrained(folder)
    family = family_of(net)
    chosen = recipe_for(recipe(*RECIPE), family, dtype_of(net))
    layers = list_layers(net, family, chosen.skip)
    quantize_model(net, layers, chosen, progress=None, family=family).apply(net)
    loading = kind.from_pretrained(folder, quantization_config=LoRaQConfig(*RECIPE))
    loading.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    state = net.state_dict()
    assert len(layers) >= 4 and sum(n.endswith(".weight_codes") for n in state) == len(layers)
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
    quantize_model(net, [layer], recipe("rtn"), progress=None).apply(net)
    assert next(net.parameters()).dtype == torch.float32
    assert dtype_of(net) == dtype_of(Experts({"transformer": net})) == torch.bfloat16
    net.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    assert torch.float32 in types.values() and torch.bfloat16 in types.values()
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == types
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in net.state_dict().items())
