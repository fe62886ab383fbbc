"""Layers, roles and shared inputs that are found, beside tables that were written by hand."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

from experiments.bench.make_fullsize import meta_model
from loraq import recipe
from loraq.errors import LoraqError
from loraq.models.denoisers import Experts
from loraq.models.discovery.structure import CROSS, UNUSED, structure_of_class
from loraq.models.discovery.traced import trace
from loraq.models.family import Family, family_names, find_family
from loraq.models.layers import family_of, list_layers
from loraq.quantization.quantizer import quantize_model
from loraq.utils.assets import ASSETS
from tests.models import shipped

ATTENTION = {
    "attn1.to_q": ("self_q", "attn1.qkv"), "attn1.to_k": ("self_k", "attn1.qkv"),
    "attn1.to_v": ("self_v", "attn1.qkv"), "attn1.to_out.0": ("self_out", "attn1.out"),
    "attn2.to_q": ("cross_q", "attn2.q"), "attn2.to_k": ("cross_k", "attn2.kv"),
    "attn2.to_v": ("cross_v", "attn2.kv"), "attn2.to_out.0": ("cross_out", "attn2.out"),
}  # fmt: skip
TABLES = {
    "PixArtTransformer2DModel": ATTENTION
    | {"ff.net.0.proj": ("ff_up", "ff.up"), "ff.net.2": ("ff_down", "ff.down")},
    "SanaTransformer2DModel": ATTENTION
    | {"ff.conv_inverted": ("ff_up", "ff.up"), "ff.conv_point": ("ff_down", "ff.down")},
}
"""The layers of a block: name → (role, input), as the two families listed them by hand."""
AFTER_GELU = {"PixArtTransformer2DModel": {"ff.net.2"}, "SanaTransformer2DModel": set()}
SKIPPED = {"attn2.to_k", "attn2.to_v"}


@pytest.mark.parametrize(
    ("model", "blocks"),
    [("tiny_pixart", None), ("tiny_sana", None), ("pixart_sigma", 28), ("sana_1_6b", 20)],
)
def test_what_is_found_equals_the_tables_written_by_hand(model, blocks):
    if blocks is None:
        config = json.loads((ASSETS / model / "transformer" / "config.json").read_text())
        kind, blocks = shipped.classes()[config["_class_name"]], config["num_layers"]
    else:
        transformer = meta_model(model)
        kind, config = type(transformer), dict(transformer.config)
    found = structure_of_class(kind, config, Family())
    assert not found.untraced
    table = TABLES[kind.__name__]
    layers = [layer for layer in found.layers if layer.quantizable]
    assert [layer.name for layer in layers] == [
        f"transformer_blocks.{block}.{inside}" for block in range(blocks) for inside in table
    ]
    for layer in layers:
        role, group = table[layer.inside]
        assert (layer.role, layer.input_id) == (role, f"{layer.block}.{group}")
        assert layer.after_gelu == (layer.inside in AFTER_GELU[kind.__name__])
        assert layer.reason == (CROSS if layer.inside in SKIPPED else "")


NOT_TRACED = {
    "BriaFibo2Transformer2DModel", "Cosmos3OmniTransformer", "EasyAnimateTransformer3DModel",
    "HunyuanDiT2DModel", "HunyuanVideoFramepackTransformer3DModel",
    "JoyImageEditPlusTransformer3DModel", "Kandinsky6SRTransformer3DModel",
    "LuminaNextDiT2DModel", "MiniMaxH3Transformer3DModel", "MiniMaxMusic3Transformer1DModel",
    "OmniGenTransformer2DModel", "PriorTransformer", "RFD4ProteinaTransformer",
    "SanaWMLTX2RefinerTransformer3DModel", "SanaWMTransformer3DModel", "TransformerTemporalModel",
    "WanAnimate2Transformer3DModel", "WanAnimateTransformer3DModel",
}  # fmt: skip
"""Classes whose forward takes arguments that no rule makes; their layers are grouped by name."""


def test_every_transformer_of_diffusers_has_blocks_with_distinct_roles():
    untraced = set()
    for name in shipped.classes():
        found = shipped.structure(name)
        if found.untraced:
            untraced.add(name)
        layers = [layer for layer in found.layers if layer.block]
        assert any(not layer.reason for layer in layers), name
        for block in {layer.block for layer in layers}:
            roles = [layer.role for layer in layers if layer.block == block]
            assert len(roles) == len({*roles}), (name, block)
        assert all(layer.role.replace("_", "a").isalnum() for layer in layers), name
    assert untraced <= NOT_TRACED


@pytest.mark.parametrize("name", family_names())
def test_a_family_is_the_key_of_a_cache(name):
    assert hash(find_family(name)) == hash(find_family(name))


def test_layers_share_an_input_across_modules_and_never_across_blocks():
    flux = shipped.structure("FluxTransformer2DModel")
    ids = {layer.name: layer.input_id for layer in flux.layers}
    single = "single_transformer_blocks.1"
    inputs = {ids[f"{single}.{name}"] for name in ("attn.to_q", "attn.to_v", "proj_mlp")}
    assert inputs == {f"{single}.attn.qkv_up"}
    double = "transformer_blocks.0.attn"
    assert ids[f"{double}.to_q"] == ids[f"{double}.to_k"] != ids[f"{double}.add_q_proj"]
    gelu = {layer.inside for layer in flux.layers if layer.block and layer.after_gelu}
    assert gelu == {"ff.net.2", "ff_context.net.2"}  # proj_out reads attention as well


def test_a_second_self_attention_is_no_cross_attention():
    """SD3.5's attn2 reads the image tokens, as the trace says; its name says otherwise."""
    found = shipped.structure("SD3Transformer2DModel")
    second = [layer for layer in found.layers if ".attn2." in layer.name]
    assert len(second) == 4 and not any(layer.reason for layer in second)
    unused = {layer.inside for layer in found.layers if layer.block and layer.reason == UNUSED}
    assert unused == set()


def test_a_forward_without_weights_warns_of_nothing(recwarn):
    """Mochi's positions ask for float32 under autocast, of which PyTorch warns on a CPU."""
    kind = shipped.classes()["MochiTransformer3DModel"]
    _, found = trace(kind, shipped.settings(kind), Family())
    assert found.calls and not found.failure
    assert not [warning for warning in recwarn if "autocast" in str(warning.message)]


def test_layers_of_experts_have_their_component_in_front():
    kind = shipped.classes()["WanTransformer3DModel"]
    small = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64}
    experts = Experts({n: kind(**small, text_dim=32) for n in ("transformer", "transformer_2")})
    assert family_of(experts) in ("generic", "wan")
    layers = list_layers(experts, "generic")
    assert len(layers) == 2 * 8
    assert layers[-1].name == "transformer_2.blocks.0.ffn.net.2"
    assert layers[8].shares_input == "transformer_2.blocks.0.attn1.qkv"
    with pytest.raises(LoraqError, match="'self_w' matches none of 20 layers"):
        list_layers(experts, "generic", ("self_w",))


def test_experts_that_example_values_do_not_choose_are_quantised():
    """HiDream's router sends two tokens to two of its experts; all of them are layers of use."""
    kind = shipped.classes()["HiDreamImageTransformer2DModel"]
    small = {
        "patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 0,
        "attention_head_dim": 16, "num_attention_heads": 2, "caption_channels": [16, 16],
        "text_emb_dim": 16, "axes_dims_rope": (8, 4, 4), "llama_layers": [0],
    }  # fmt: skip
    network = kind(**small).eval()
    layers = list_layers(network, "generic")
    experts = {layer.name for layer in layers if ".experts." in layer.name}
    assert len(experts) == 3 * 4
    quantized = quantize_model(network, layers, recipe("rtn"), progress=None)
    with quantized.applied(network):
        quantized.check_called(network)


class InPlace(ModelMixin, ConfigMixin):
    """A block that changes its input between two layers, and a GELU's output before a third."""

    @register_to_config
    def __init__(self, in_channels: int = 16) -> None:
        super().__init__()
        names = ("attn_q", "attn_k", "ff_in", "ff_out", "other")
        layers = {name: torch.nn.Linear(in_channels, in_channels) for name in names}
        self.blocks = torch.nn.ModuleList([torch.nn.ModuleDict(layers)])

    def forward(self, hidden_states):
        (block,) = self.blocks
        q = block["attn_q"](hidden_states)
        hidden_states += 1
        hidden_states = block["attn_k"](hidden_states) + q
        gelu = torch.nn.functional.gelu(block["ff_in"](hidden_states))
        down = block["ff_out"](gelu)
        gelu *= hidden_states
        return block["other"](gelu) + down


def test_a_tensor_that_is_changed_in_place_is_another():
    found = structure_of_class(InPlace, {"in_channels": 16}, Family())
    assert not found.untraced
    by_name = {layer.inside: layer for layer in found.layers}
    assert by_name["attn_q"].input_id != by_name["attn_k"].input_id
    assert [name for name, layer in by_name.items() if layer.after_gelu] == ["ff_out"]
