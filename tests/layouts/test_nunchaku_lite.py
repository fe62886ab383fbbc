"""diffusers' nunchaku_lite: its own configuration and replacement accept the files, exact codes."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from loraq.errors import LoraqError
from loraq.formats import dequantize
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import CONFIG, WEIGHTS
from loraq.layouts.modulation import pack_modulation
from loraq.layouts.targets import find_target
from loraq.layouts.tiled_layer import tensor_scales
from loraq.transforms import InputTransform
from tests.layouts.layers import difference, packed_layer, packed_source, rows

TARGET = find_target("nunchaku_lite")
LAYERS = {
    "int4": {"a": packed_layer(256, 128), "b": packed_layer(128, 256, rank=20, smooth=False)},
    "nvfp4": {"a": packed_layer(256, 128, weight="nvfp4"), "b": packed_layer(weight="nvfp4")},
}


@pytest.fixture(params=LAYERS)
def written(request, tmp_path):
    source = packed_source(LAYERS[request.param], torch.bfloat16)
    TARGET.write(source, tmp_path)
    return source, tmp_path


def test_what_is_read_is_what_was_packed(written):
    source, folder = written
    assert TARGET.detect(folder)
    contents = TARGET.read(folder)
    assert list(contents.layers) == ["a", "b"]
    assert set(contents.others) == {"plain.weight", "plain.bias"}
    for name, layer in source.layers.items():
        found = contents.layers[name]
        assert torch.equal(found.weight.codes, layer.weight.codes)
        assert difference(dequantize(found.weight), dequantize(layer.weight)) < 2e-3
        x = rows(layer.weight.shape[1])
        assert difference(EngineLinear(found)(x), layer.forward(x)) < 3e-2


@pytest.fixture
def nunchaku_utils(monkeypatch):
    """diffusers' own replacement of modules; only the kernels, which need a GPU, are absent."""
    kernels = ModuleType("kernels")
    kernels.__spec__ = ModuleSpec("kernels", None)
    kernels.get_kernel = lambda *_, **__: SimpleNamespace(ops=None)
    monkeypatch.setitem(sys.modules, "kernels", kernels)
    for name in ("diffusers.utils", "diffusers.utils.import_utils"):
        module = importlib.import_module(name)
        monkeypatch.setattr(module, "is_kernels_available", lambda: True)
        monkeypatch.setattr(module, "is_kernels_version", lambda *_: False, raising=False)
    constants = importlib.import_module("diffusers.utils.constants")
    monkeypatch.setattr(constants, "DIFFUSERS_TRUST_REMOTE_KERNELS", True)
    path = "diffusers.quantizers.nunchaku.utils"
    yield importlib.import_module(path)
    sys.modules.pop(path)


def test_diffusers_finds_exactly_its_own_tensors(written, nunchaku_utils):
    from diffusers import NunchakuLiteQuantizationConfig

    source, folder = written
    settings = json.loads((folder / CONFIG).read_text())["quantization_config"]
    assert settings.pop("quant_method") == "nunchaku_lite"
    config = NunchakuLiteQuantizationConfig(**settings)
    assert config.svdq_w4a4["targets"] == list(source.layers)

    plain = {name: nn.Linear(*reversed(t.weight.shape)) for name, t in source.layers.items()}
    network = nn.ModuleDict(plain | {"plain": nn.LayerNorm(8)}).to(torch.bfloat16)
    replaced = nunchaku_utils.replace_with_nunchaku_linear(
        network, config.to_dict(), config.compute_dtype
    )
    tensors = load_file(folder / WEIGHTS)
    assert replaced == 2
    nunchaku_utils.check_strict_state_dict_match(network, tensors)
    for name, expected in network.state_dict().items():
        if not name.startswith("plain"):
            assert (tensors[name].shape, tensors[name].dtype) == (expected.shape, expected.dtype)


def test_a_tensor_scale_is_two_numbers_of_16_bits():
    for value in (2.0**-12, 1.2345e-4, 7.77e-4):
        scale = torch.tensor(value)
        rows_O, whole = tensor_scales(scale, 3, torch.bfloat16)
        assert abs(float(rows_O[1].float() * whole.float() / scale) - 1) < 2.0**-12
    rows_O, whole = tensor_scales(torch.tensor(2.0**-12), 3, torch.bfloat16)
    assert rows_O.eq(1).all() and whole == 2.0**-12  # held exactly
    assert tensor_scales(None, 3, torch.bfloat16)[1] == 1


def test_scales_of_rows_are_read_as_such(tmp_path):
    layer = packed_layer(weight="nvfp4", tensor_scale="token")
    TARGET.write(packed_source({"a": layer}, torch.bfloat16), tmp_path)
    found = TARGET.read(tmp_path).layers["a"].weight
    assert found.format.tensor_scale == "token" and torch.equal(found.codes, layer.weight.codes)
    assert torch.allclose(found.tensor_scale, layer.weight.tensor_scale, rtol=2**-8)


ROTATED = InputTransform(signs_I=torch.ones(128, dtype=torch.int8), block=64)


@pytest.mark.parametrize(
    ("message", "layer"),
    [
        ("rotated.*loraq_export", replace(packed_layer(), transform=ROTATED)),
        ("shifted by 0.171875.*loraq_export", packed_layer(shift=True)),
        (
            "weight is mxfp4_e2m1.*format@quant.weight=int4 or",
            packed_layer(weight="mxfp4_e2m1", branch="bf16"),
        ),
        ("int4 g32", packed_layer(block=32)),
        ("192 inputs and 128 outputs.*128.*quant.skip", packed_layer(width=192)),
        ("128 inputs and 96 outputs", packed_layer(out=96)),
    ],
)
def test_what_the_layout_cannot_express_is_refused(message, layer):
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(TARGET.refuse(packed_source({"a": layer}), "a"))


def test_a_convolution_and_mixed_formats_are_refused():
    source = packed_source(
        {"a": packed_layer(), "b": packed_layer(weight="nvfp4"), "c": packed_layer()}
    )
    source.network["c"].convolution = True
    assert TARGET.refuse(source, "a") is None
    assert "other layers have another format" in TARGET.refuse(source, "b")
    assert "1×1 convolution" in TARGET.refuse(source, "c")


def test_losses_name_activations_scales_and_ranks():
    assert "factors of the branch, are rounded to bfloat16" in "\n".join(
        TARGET.losses(packed_source({"a": packed_layer(smooth=False)}, torch.bfloat16))
    )
    layers = {
        "a": packed_layer(weight="nvfp4", activation="mxfp4_e2m1"),
        "b": packed_layer(weight="nvfp4", rank=20),
    }
    text = "\n".join(TARGET.losses(packed_source(layers, torch.bfloat16)))
    assert "rounded to nvfp4 fixed, not to mxfp4_e2m1" in text
    assert "product of two numbers of bfloat16" in text
    assert "Branches of rank 16 to 20 are padded" in text


def test_reading_is_strict(tmp_path):
    TARGET.write(packed_source(LAYERS["int4"], torch.bfloat16), tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), (tmp_path / CONFIG).read_text()
    wrong = {
        "'a.wscales' is missing": {"a.wscales": None},
        "'a.wscale' is no tensor of this layout. Did you mean wscales": {"a.wscale": torch.ones(1)},
        r"'a.wscales' is .*float32": {"a.wscales": tensors["a.wscales"].float()},
        "holds no tensors of the listed layer 'b'": {
            n: None for n in tensors if n.startswith("b.")
        },
    }
    for message, changes in wrong.items():
        held = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(held, tmp_path / WEIGHTS)
        with pytest.raises(LoraqError, match=message):
            TARGET.read(tmp_path)
    save_file(tensors, tmp_path / WEIGHTS)
    for message, old, new in (
        ("lists no layer 'b'", '"b"', '"c"'),
        ("group_size 64", '"group_size": 64', '"group_size": 16'),
        ("and rank 16", '"rank": 32', '"rank": 16'),
        ("layer 'norm'", '"svdq_w4a4"', '"awq_w4a16": {"targets": ["norm"]}, "svdq_w4a4"'),
    ):
        (tmp_path / CONFIG).write_text(config.replace(old, new))
        with pytest.raises(LoraqError, match=message):
            TARGET.read(tmp_path)


def test_layers_of_4_bit_weights_alone_are_read_by_value(tmp_path):
    TARGET.write(packed_source(LAYERS["int4"], torch.bfloat16), tmp_path)
    tensors, config = load_file(tmp_path / WEIGHTS), json.loads((tmp_path / CONFIG).read_text())
    weight, bias = torch.randint(-7, 8, (8, 128)).bfloat16(), torch.arange(8).bfloat16()
    weight[:, ::64] = 7
    held = {f"norm.{n}": t for n, t in pack_modulation(weight, bias, 1, torch.bfloat16).items()}
    save_file({n: t.contiguous() for n, t in (tensors | held).items()}, tmp_path / WEIGHTS)
    section = {"precision": "int4", "group_size": 64, "targets": ["norm"]}
    config["quantization_config"]["awq_w4a16"] = section
    (tmp_path / CONFIG).write_text(json.dumps(config))
    others = TARGET.read(tmp_path).others
    assert torch.equal(others["norm.weight"], weight) and torch.equal(others["norm.bias"], bias)
