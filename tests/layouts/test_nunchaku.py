"""nunchaku's single file: fused modules, unsigned inputs, W4A16 modulation; read into diffusers."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS, read_metadata, write_tensors
from loraq.layouts.importing import find_layout, load_network
from loraq.layouts.modulation import pack_codes, pack_modulation, unpack_codes, unpack_modulation
from loraq.layouts.nunchaku import KINDS
from loraq.layouts.targets import Source, find_target
from tests.layouts.layers import difference, packed_layer, packed_source, rows
from tests.layouts.numbered import numbered

TARGET = find_target("nunchaku")
KEYS = {"to_k": 1, "to_v": 2, "add_k_proj": 1, "add_v_proj": 2, "w3": 1}
"""Layers that share R with the first one of their input: seeds of their weights."""


@cache
def layer(weight, out, width, seed, shift=False):
    made = packed_layer(out, width, weight=weight, seed=seed, shift=shift)
    if seed:
        first = layer(weight, out, width, 0)
        made = replace(made, transform=first.transform, right=first.right)
    return made


def packed(network, weight, shifts=()):
    """`network` with every layer packed that nunchaku's class quantises."""
    kind = KINDS[type(network).__name__]
    names = [name for name, _ in network.named_modules()]
    layers = {}
    for name in (part for parts in kind.layers(names).values() for part in parts):
        module, seed = network.get_submodule(name), KEYS.get(name.rpartition(".")[2], 0)
        shift = name.endswith(shifts) if shifts else False
        made = layer(weight, module.out_features, module.in_features, seed, shift)
        layers[name] = made if module.bias is not None else replace(made, bias_O=None)
        network.set_submodule(name, QuantizedLinear(layers[name]))
    return Source(network.bfloat16(), layers, torch.bfloat16)


@pytest.fixture(scope="module")
def z_image(tmp_path_factory):
    from diffusers import ZImageTransformer2DModel

    sizes = {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "axes_dims": [32, 48, 48]}
    network = ZImageTransformer2DModel(
        in_channels=4, n_layers=1, n_refiner_layers=1, cap_feat_dim=64, **sizes
    )
    source = packed(network, "nvfp4")
    folder = tmp_path_factory.mktemp("z_image")
    TARGET.write(source, folder)
    return source, folder


@pytest.fixture(scope="module")
def qwen_image(tmp_path_factory):
    from diffusers import QwenImageTransformer2DModel

    network = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=1, attention_head_dim=64, num_attention_heads=2,
        joint_attention_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    source = packed(network, "int4", shifts=("img_mlp.net.2",))
    folder = tmp_path_factory.mktemp("qwen_image")
    TARGET.write(source, folder)
    return source, folder


def compare(source, folder, limit):
    assert find_layout(folder) is TARGET
    network = load_network(folder)
    for name, layer in source.layers.items():
        module, behind_gelu = network.get_submodule(name), name.endswith("mlp.net.2")
        assert isinstance(module, EngineLinear)
        assert torch.equal(module.layer.weight.codes, layer.weight.codes), name
        x = rows(layer.weight.shape[1], after_gelu=behind_gelu)
        assert difference(module(x), layer.forward(x)) < limit(name), name
    return network


def test_fused_rows_come_back_as_query_key_and_value(z_image):
    source, folder = z_image
    assert all(TARGET.refuse(source, name) is None for name in source.layers)
    tensors = load_file(folder / WEIGHTS)
    assert tensors["layers.0.attention.to_qkv.qweight"].shape == (3 * 384, 192)
    assert tensors["layers.0.feed_forward.net.0.proj.proj_up"].shape == (2048, 16)
    assert not any(".w1." in name or ".to_q." in name for name in tensors)
    assert read_metadata(folder)["model_class"] == "NunchakuZImageTransformer2DModel"
    network = compare(source, folder, lambda _: 4e-2)
    for name, tensor in source.other_tensors().items():
        assert torch.equal(network.get_parameter(name), tensor), name


def test_int4_behind_a_gelu_is_unsigned_and_modulation_is_rounded(qwen_image):
    source, folder = qwen_image
    assert all(TARGET.refuse(source, name) is None for name in source.layers)
    text = "\n".join(TARGET.losses(source))
    assert "rounded to unsigned codes" in text and "2 modulation layers" in text
    # txt_mlp.net.2 was packed with signed inputs, which nunchaku rounds to unsigned ones
    limits = {"transformer_blocks.0.txt_mlp.net.2": 0.2}
    network = compare(source, folder, lambda name: limits.get(name, 3e-2))
    found = network.get_submodule("transformer_blocks.0.img_mlp.net.2").layer
    assert found.shift and found.activation.name == "uint4"
    for name in ("img_mod.1", "txt_mod.1"):
        path = f"transformer_blocks.0.{name}"
        ours, theirs = source.network.get_submodule(path), network.get_submodule(path)
        assert isinstance(theirs, nn.Linear)
        assert 0.01 < difference(theirs.weight, ours.weight) < 0.15
        assert torch.allclose(theirs.bias, ours.bias, atol=2**-8)  # 1 + bias in bfloat16


def test_modulation_that_four_bits_hold_is_exact():
    codes = torch.randint(-7, 8, (12, 128), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::64] = 7
    scale = 2.0 ** torch.arange(12)[:, None]
    bias = torch.arange(12).float()
    held = pack_modulation(codes * scale, bias, 6, torch.bfloat16)
    found = unpack_modulation("a", held, 6)
    assert torch.equal(found["a.weight"].float(), codes * scale)
    assert torch.equal(found["a.bias"].float(), bias)


def test_bytes_of_modulation_are_those_of_other_packers():
    # tests/engines/test_modulation.py compares them with auto-round 0.16.1.
    codes = numbered(8, 128) % 15
    words = pack_codes(codes)
    assert words.shape == (2, 64) and words.dtype == torch.int32
    assert torch.equal(unpack_codes(words), codes)
    assert hashlib.sha256(words.numpy().tobytes()).hexdigest()[:16] == "a7e63d284ded289e"


def test_plain_fused_layers_of_skipped_refiners_are_divided(z_image, tmp_path):
    _, folder = z_image
    tensors, metadata = load_file(folder / WEIGHTS), read_metadata(folder)
    module = "noise_refiner.0.feed_forward.net.0.proj"
    kept = {n: t for n, t in tensors.items() if not n.startswith(f"{module}.")}
    fused = torch.randn(2048, 384)
    write_tensors(tmp_path / WEIGHTS, {**kept, f"{module}.weight": fused}, metadata)
    others = TARGET.read(tmp_path).others
    assert torch.equal(others["noise_refiner.0.feed_forward.w3.weight"], fused[:1024])
    assert torch.equal(others["noise_refiner.0.feed_forward.w1.weight"], fused[1024:])


def test_what_nunchaku_does_not_have_is_refused(z_image):
    source, _ = z_image
    assert "no class for ModuleDict" in TARGET.refuse(packed_source({"a": packed_layer()}), "a")
    q, k = "layers.0.attention.to_q", "layers.0.attention.to_k"
    fewer = replace(source, layers={n: t for n, t in source.layers.items() if n != k})
    assert f"quantises '{k}' too" in TARGET.refuse(fewer, q)
    own_R = replace(source.layers[k], right=packed_layer(384, 384, seed=5).right)
    apart = replace(source, layers={**source.layers, k: own_R})
    assert f"fuses it with '{q}'" in TARGET.refuse(apart, k)


def test_files_of_other_classes_are_refused(z_image, tmp_path):
    _, folder = z_image
    metadata = read_metadata(folder) | {"model_class": "NunchakuSanaTransformer2DModel"}
    write_tensors(tmp_path / WEIGHTS, {"a.weight": torch.ones(1)}, metadata)
    assert find_layout(tmp_path) is TARGET
    with pytest.raises(LoraqError, match=r"NunchakuSanaTransformer2DModel.*nunchaku_lite"):
        TARGET.read(tmp_path)
