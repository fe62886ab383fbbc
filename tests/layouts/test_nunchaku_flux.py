"""nunchaku's file of FLUX.1 in a network of diffusers: names, fused rows, and added columns."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS, own_config, write_tensors
from loraq.layouts.importing import load_contents, load_network
from loraq.layouts.modulation import pack_modulation
from loraq.layouts.single_file import older
from loraq.layouts.tiled_layer import pack_layer
from loraq.layouts.tiled_network import tiled_layers
from loraq.transforms import GELU_SHIFT
from tests.layouts.layers import difference, packed_layer, packed_source, rows

SHAPES = {
    "transformer_blocks.0.": {
        "qkv_proj": (384, 128), "qkv_proj_context": (384, 128), "out_proj": (128, 128),
        "out_proj_context": (128, 128), "mlp_fc1": (512, 128), "mlp_fc2": (128, 512),
        "mlp_context_fc1": (512, 128), "mlp_context_fc2": (128, 512),
    },
    "single_transformer_blocks.0.": {
        "qkv_proj": (384, 128), "out_proj": (128, 128), "mlp_fc1": (512, 128),
        "mlp_fc2": (128, 512),
    },
}  # fmt: skip
NORMS = {"norm1.linear": 6, "norm1_context.linear": 6, "norm.linear": 3}


@pytest.fixture(scope="module", params=["int4", "nvfp4"])
def made(request, tmp_path_factory):
    """The file, and its layers by nunchaku's names before they were packed in tiles."""
    from diffusers import FluxTransformer2DModel

    network = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=64,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    ).bfloat16()  # fmt: skip
    layers = {
        block.replace(".", "/") + name: packed_layer(*shape, weight=request.param, seed=seed)
        for seed, (block, shapes) in enumerate(SHAPES.items())
        for name, shape in shapes.items()
    }
    tiled = tiled_layers(packed_source(layers, torch.bfloat16))
    tiled = {name.replace("/", "."): layer for name, layer in tiled.items()}
    tensors = {f"{n}.{s}": t for n, x in tiled.items() for s, t in older(pack_layer(x)).items()}
    for name, module in network.named_modules():
        block, _, end = name.partition(".0.")
        if end in NORMS:
            own = module.weight.detach(), module.bias.detach()
            held = pack_modulation(*own, NORMS[end], torch.bfloat16)
            tensors |= {f"{block}.0.{end}.{suffix}": t for suffix, t in held.items()}
        elif isinstance(module, nn.RMSNorm) or not block.endswith("blocks"):
            values = module.named_parameters(recurse=False)
            tensors |= {f"{name.replace('attn.', '')}.{n}": p.detach() for n, p in values}
    metadata = {"model_class": "NunchakuFluxTransformer2dModel"}
    metadata["config"] = json.dumps(own_config(network))
    folder = tmp_path_factory.mktemp("flux")
    write_tensors(folder / WEIGHTS, tensors, metadata)
    return request.param, folder, tiled


def test_every_layer_is_found_in_the_network_of_diffusers(made):
    weight, folder, tiled = made
    network = load_network(folder)
    block = network.transformer_blocks[0]
    fused, x = tiled["transformer_blocks.0.qkv_proj_context"], rows()
    expected = EngineLinear(fused)(x)
    found = [getattr(block.attn, f"add_{part}_proj")(x) for part in "qkv"]
    assert difference(torch.cat(found, -1), expected) < 5e-3  # the branch's intermediate
    assert block.ff.net[2].layer.shift == (GELU_SHIFT if weight == "int4" else 0)
    assert not network.single_transformer_blocks[0].proj_mlp.layer.shift


def test_the_last_layer_of_a_single_block_adds_two(made):
    weight, folder, tiled = made
    module = load_network(folder).single_transformer_blocks[0].proj_out
    attention = tiled["single_transformer_blocks.0.out_proj"]
    feed_forward = load_contents(folder).layers["transformer_blocks.0.ff.net.2"]
    own = tiled["single_transformer_blocks.0.mlp_fc2"]
    for name in ("weight", "smooth_I", "down_IR", "up_OR", "bias_O"):
        object.__setattr__(feed_forward, name, getattr(own, name))  # unsigned in INT4, as there
    x, gelu = rows(), rows(512, after_gelu=True)
    expected = EngineLinear(attention)(x) + EngineLinear(feed_forward)(gelu)
    assert difference(module(torch.cat([x, gelu], -1)), expected) < 1e-2
    assert module.layer.signed_inputs == (128 if weight == "int4" else 0)
    assert difference(module(torch.cat([x, gelu + 1], -1)), expected) > 0.1
