"""MXFP4 as auto-round writes it: padded tiles, older names, exact codes, trimmed into a network."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from loraq.errors import LoraqError
from loraq.formats import dequantize, get_format
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS, read_metadata
from loraq.layouts.importing import find_layout, load_contents, put_into
from loraq.layouts.targets import find_target
from tests.layouts.layers import difference, packed_layer, packed_source, rows

TARGET = find_target("nunchaku_mxfp4")


def made(out, width, **options):
    return packed_layer(out, width, weight="mxfp4_e2m1", branch="bf16", **options)


def test_padded_layers_are_read_into_a_network(tmp_path):
    layers = {"a": made(200, 160, rank=20), "b": made(128, 200)}
    source = packed_source(layers, torch.bfloat16)
    assert "2 layers are padded" in "\n".join(TARGET.losses(source))
    TARGET.write(source, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["a.qweight"].shape == (256, 128) and tensors["a.wscales"].shape == (8, 256)
    suffixes = {name.partition(".")[2] for name in tensors if name.startswith("a.")}
    assert suffixes == {
        *("qweight", "wscales", "smooth", "smooth_orig", "lora_down", "lora_up", "bias"),
    }
    config = json.loads(read_metadata(tmp_path)["quantization_config"])
    assert config["rank"] == 32 and config["weight"] == {
        "dtype": "fp4_e2m1_all",
        "scale_dtype": "ue8m0",
        "group_size": 32,
    }
    assert find_layout(tmp_path) is TARGET
    network = nn.ModuleDict({n: nn.Linear(*reversed(t.weight.shape)) for n, t in layers.items()})
    network["plain"] = nn.LayerNorm(8)
    put_into(network, load_contents(tmp_path))
    for name, layer in layers.items():
        module = network[name]
        assert isinstance(module, EngineLinear)
        assert torch.equal(dequantize(module.layer.weight), dequantize(layer.weight))
        x = rows(layer.weight.shape[1])
        layer = replace(layer, activation=get_format("mxfp4_e2m1", exponent="rceil"))
        assert difference(module(x), layer.forward(x)) < 3e-2


def test_what_is_cut_off_must_be_padding(tmp_path):
    TARGET.write(packed_source({"a": made(128, 128)}, torch.bfloat16), tmp_path)
    network = nn.ModuleDict({"a": nn.Linear(96, 128), "plain": nn.LayerNorm(8)})
    with pytest.raises(LoraqError, match=r"'a' is \(128, 128\) in the file and \(128, 96\)"):
        put_into(network, load_contents(tmp_path))


def test_other_formats_are_refused():
    source = packed_source({"a": packed_layer()})
    assert "format@quant.weight=mxfp4_e2m1" in TARGET.refuse(source, "a")
    assert TARGET.refuse(packed_source({"a": made(96, 96)}), "a") is None
