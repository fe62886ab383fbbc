"""Row-major layouts of ModelOpt, vLLM-Omni, SDNQ and ComfyUI: bytes, emulation, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq.errors import LoraqError
from loraq.formats import dequantize, get_format, quantize
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import CONFIG, WEIGHTS
from loraq.layouts.scale_tiles import from_tiles, to_tiles
from loraq.layouts.targets import find_target
from loraq.transforms import InputTransform
from loraq.transforms.hadamard import regular_signs
from tests.layouts.layers import difference, packed_layer, packed_source, rows

FIXED = get_format("nvfp4", tensor_scale="fixed")


def nvfp4(**settings):
    """A layer with NVFP4 activations of a scale of 1."""
    layer = packed_layer(weight="nvfp4", branch="bf16", **settings)
    return replace(layer, activation=FIXED)


def mxfp8():
    """A layer whose activations are rounded as ComfyUI rounds them."""
    layer = packed_layer(weight="mxfp8_e4m3", rank=0, smooth=False)
    return replace(layer, activation=get_format("mxfp8_e4m3", exponent="rceil"))


def rotated(block=64, activation="int4", width=128):
    """An INT4 layer behind a regular rotation, with scales of channels and tokens."""
    plain = packed_layer(rank=0, smooth=False, width=width)
    turn = InputTransform(signs_I=regular_signs(width, block), block=block)
    w_OI = turn.weight(dequantize(plain.weight))
    return replace(
        plain,
        weight=quantize(w_OI, get_format("int4", "channel")),
        activation=get_format(activation, "token"),
        transform=turn,
    )


CASES = {
    "modelopt": ("modelopt", nvfp4(), nvfp4(rank=20, smooth=False)),
    "modelopt plain": ("modelopt", nvfp4(rank=0, smooth=False), None),
    "vllm-omni": ("vllm-omni", nvfp4(), nvfp4(rank=0)),
    "sdnq": ("sdnq", packed_layer(smooth=False), packed_layer(smooth=False, width=64, rank=8)),
    "sdnq plain": ("sdnq", packed_layer(smooth=False, rank=0, block=32), None),
    "nvfp4": ("comfyui-nvfp4", nvfp4(rank=0), nvfp4(rank=0, smooth=False)),
    "mxfp8": ("comfyui-mxfp8", mxfp8(), None),
    "convrot": ("comfyui-convrot_w4a4", rotated(), rotated(16, "int8", 192)),
}


@pytest.mark.parametrize(("name", "first", "second"), CASES.values(), ids=CASES)
def test_a_layer_is_the_same_after_writing_and_reading(tmp_path, name, first, second):
    target, dtype = find_target(name), torch.bfloat16 if name == "vllm-omni" else torch.float16
    layers = {"a": first} if second is None else {"a": first, "b": second}
    source = packed_source(layers, dtype)
    assert "inputs and outputs of these layers, are in " in "\n".join(target.losses(source))
    assert not any(target.refuse(source, layer) for layer in source.layers)
    target.write(source, tmp_path)
    assert target.detect(tmp_path)
    contents = target.read(tmp_path)
    assert set(contents.layers) == set(source.layers)
    assert set(contents.others) == {"plain.weight", "plain.bias"}
    for layer, packed in source.layers.items():
        read, x = contents.layers[layer], rows(packed.weight.shape[1])
        alike = replace(packed, activation=get_format("fp16")) if name == "sdnq" else packed
        # 16-bit arithmetic rounds some activations the other way; anything wrong differs by ≈ 1
        assert difference(EngineLinear(read)(x), alike.forward(x)) < 3e-2
        if not packed.transform.block:  # else the codes are those of the reader's rotation
            expected = dequantize(packed.weight)
            rounded = 2.0**-12 if name == "vllm-omni" else 0.0  # of the tensor scale
            assert torch.allclose(dequantize(read.weight), expected, rtol=rounded, atol=0)
            assert torch.equal(read.weight.codes, packed.weight.codes)


def test_the_detected_layout_is_one_alone(tmp_path):
    for case, (name, layer, _) in CASES.items():
        folder = tmp_path / case
        folder.mkdir()
        find_target(name).write(packed_source({"a": layer}, torch.bfloat16), folder)
        names = {name for name, _, _ in CASES.values()}
        assert [n for n in names if find_target(n).detect(folder)] == [name]


def test_a_static_scale_covers_what_was_captured_or_is_1(tmp_path):
    layer = replace(nvfp4(), activation=get_format("nvfp4", tensor_scale="token"))
    x, target = rows() * 50, find_target("modelopt")
    for captured in (True, False):
        source = packed_source({"a": layer}, torch.bfloat16, inputs={"a": x}, captured=captured)
        target.write(source, tmp_path)
        scale = load_file(tmp_path / WEIGHTS)["a.input_scale"]
        largest = layer.transform.input(x).abs().max()
        assert scale == (torch.tensor(2.0) * largest / (6 * 448) if captured else 1)
        said = "\n".join(target.losses(source))
        assert ("2 times the largest captured value" if captured else "no inputs were") in said
    exact = packed_source({"a": nvfp4()}, torch.bfloat16, inputs={"a": x}, captured=True)
    target.write(exact, tmp_path)
    assert load_file(tmp_path / WEIGHTS)["a.input_scale"] == 1
    assert "static scale" not in "\n".join(target.losses(exact))


# Made by comfy-kitchen 0.2.40: quantize_nvfp4(x, max|x| / 2688) and quantize_mxfp8(x) of
# x = cat(copies * [linspace(-3, 3, n).view(2, -1) * [[1], [0.3]]]); two rows, and their two scales.
GOLDEN = {
    "comfyui-nvfp4": (32, 8, "fffeeeedddcbba980123445556667777", [126, 112]),
    "comfyui-mxfp8": (
        *(64, 16),
        "fcfcfbfbfafafaf9f9f9f8f8f7f6f5f5f4f3f2f2f1f0eeedebeae8e6e3dfd9cc"
        "4753595d6062646668696a6b6b6c6d6e6f707071717272737374747575757676",
        [120, 119],
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_comfy_kitchen_makes_the_same_bytes(tmp_path, name):
    numbers, copies, codes, scales = GOLDEN[name]
    x = torch.linspace(-3, 3, numbers).view(2, -1) * torch.tensor([[1.0], [0.3]])
    kind = {"exponent": "rceil"} if name == "comfyui-mxfp8" else {"tensor_scale": "tensor"}
    fmt = "mxfp8_e4m3" if name == "comfyui-mxfp8" else "nvfp4"
    weight = quantize(torch.cat(copies * [x]), get_format(fmt, **kind))
    layer = replace(mxfp8(), weight=weight, bias_O=None)
    find_target(name).write(packed_source({"a": layer}, torch.bfloat16), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    assert tensors["a.weight"][:2].view(torch.uint8).numpy().tobytes().hex() == codes
    tiles = tensors["a.weight_scale"].view(torch.uint8).flatten()
    assert tiles[tiles.nonzero()].flatten().tolist() == scales * copies
    assert tiles.nonzero().flatten().tolist() == list(range(0, 32 * copies, 16))


def test_a_dynamic_scale_of_comfyui_is_that_of_the_whole_call(tmp_path):
    layer = replace(nvfp4(rank=0), activation=get_format("nvfp4", tensor_scale="token"))
    source, target = packed_source({"a": layer}, torch.bfloat16), find_target("comfyui-nvfp4")
    target.write(source, tmp_path)
    assert "a.input_scale" not in load_file(tmp_path / WEIGHTS)
    module, x = EngineLinear(target.read(tmp_path).layers["a"]), rows()
    assert not torch.equal(module(torch.cat([x, 1e5 * x]))[: len(x)], module(x))
    said = "\n".join(target.losses(source))
    assert "images of a batch depend on each other" in said and "not to nvfp4 token" in said


def test_weights_alone_take_the_shift_into_the_bias(tmp_path):
    layer, target = packed_layer(smooth=False, shift=True), find_target("sdnq")
    source = packed_source({"a": layer}, torch.bfloat16)
    target.write(source, tmp_path)
    x = rows(after_gelu=True)
    expected = replace(layer, activation=get_format("bf16")).forward(x)
    assert difference(EngineLinear(target.read(tmp_path).layers["a"])(x), expected) < 1e-2
    assert "rounded to bf16, not to uint4" in "\n".join(target.losses(source))


def test_what_a_layout_cannot_express_is_refused():
    turned = replace(
        packed_layer(smooth=False, rank=0, weight="nvfp4"),
        transform=InputTransform(signs_I=torch.ones(128, dtype=torch.int8), block=64),
    )
    cases = [
        ("modelopt", "hadamard=0", turned),
        ("modelopt", "shift=false", nvfp4(shift=True)),
        ("modelopt", "its weight is int4 g64", packed_layer()),
        ("modelopt", "40 inputs are no multiple of 16", nvfp4(width=40)),
        ("sdnq", "smooth=none", packed_layer()),
        ("sdnq", "weight is nvfp4", nvfp4(smooth=False)),
        ("sdnq", "96 inputs are no multiple of 64", packed_layer(width=96, smooth=False)),
        ("comfyui-nvfp4", "it has a branch", nvfp4()),
        ("comfyui-nvfp4", "24 × 128, and both must be multiples of 16", nvfp4(rank=0, out=24)),
        ("comfyui-mxfp8", "its weight is nvfp4", nvfp4(rank=0)),
        ("comfyui-convrot_w4a4", "block=channel", packed_layer(rank=0, smooth=False)),
        (
            "comfyui-convrot_w4a4",
            "signs=regular",
            replace(rotated(), transform=turned.transform),
        ),
        (
            "comfyui-convrot_w4a4",
            "shift=false",
            replace(rotated(), transform=replace(rotated().transform, shift=0.5)),
        ),
    ]  # fmt: skip
    for name, reason, layer in cases:
        found = find_target(name).refuse(packed_source({"a": layer}, torch.bfloat16), "a")
        assert found is not None and reason in found, (name, reason, found)


def test_vllm_omni_wants_bfloat16_and_names_that_tell_layers_apart():
    target, source = find_target("vllm-omni"), packed_source({"a": nvfp4()}, torch.float16)
    assert "dtype=bfloat16" in (target.refuse(source, "a") or "")
    source = packed_source({"proj_out_2": nvfp4()}, torch.bfloat16)
    assert target.refuse(source, "proj_out_2") is None
    source.network["proj_out"] = torch.nn.Linear(8, 8)
    assert "16-bit layer 'proj_out'" in (target.refuse(source, "proj_out_2") or "")


def test_reading_is_strict(tmp_path):
    for name, layer, missing in (
        ("modelopt", nvfp4(), "a.pre_quant_scale"),
        ("vllm-omni", nvfp4(), "a.wscales"),
        ("sdnq", packed_layer(smooth=False), "a.svd_down"),
        ("comfyui-nvfp4", nvfp4(rank=0), "a.weight_scale_2"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        find_target(name).write(packed_source({"a": layer}, torch.bfloat16), folder)
        right = load_file(folder / WEIGHTS)
        for message, changes in {
            f"'{missing}' is missing": {missing: None},
            "'a.extra' is no tensor": {"a.extra": torch.ones(1)},
            r"'a.bias' is \(3,\)": {"a.bias": torch.ones(3).bfloat16()},
        }.items():
            held = {n: t for n, t in (right | changes).items() if t is not None}
            save_file(held, folder / WEIGHTS)
            with pytest.raises(LoraqError, match=message):
                find_target(name).read(folder)


def test_settings_that_change_what_is_computed_are_not_read(tmp_path):
    target = find_target("sdnq")
    target.write(packed_source({"a": packed_layer(smooth=False)}, torch.bfloat16), tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    config["quantization_config"]["use_hadamard"] = True
    (tmp_path / CONFIG).write_text(json.dumps(config))
    with pytest.raises(LoraqError, match="use_hadamard=True"):
        target.read(tmp_path)
    target = find_target("comfyui-convrot_w4a4")
    target.write(packed_source({"a": rotated()}, torch.bfloat16), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    for said, message in (
        ('{"format": "nvfp5"}', "Unknown format of 'a' 'nvfp5'. Did you mean 'nvfp4'"),
        ('{"format": "convrot_w4a4", "convrot_groupsize": 32}', "convrot_groupsize=32"),
        ('{"format": "convrot_w4a4", "convrot_groupsize": "64"}', "convrot_groupsize=64"),
        ('{"format": "convrot_w4a4", "full_precision_matrix_mult": true}', "full_precision"),
        ("[", "holds no JSON object"),
    ):
        tensors["a.comfy_quant"] = torch.tensor(list(said.encode()), dtype=torch.uint8)
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(LoraqError, match=message):
            target.read(tmp_path)


def test_scales_of_float32_are_read_without_values_of_float32(tmp_path):
    target = find_target("comfyui-convrot_w4a4")
    target.write(packed_source({"a": rotated()}, torch.bfloat16), tmp_path)
    before, tensors = target.read(tmp_path).layers["a"].weight, load_file(tmp_path / WEIGHTS)
    tensors["a.weight_scale"] *= 1.0001
    save_file(tensors, tmp_path / WEIGHTS)
    found = target.read(tmp_path).layers["a"].weight
    assert torch.allclose(dequantize(found), 1.0001 * dequantize(before), rtol=1e-6, atol=0)
    assert found.nbytes == 128 * 64 + 128 * 4


def test_row_factors_of_a_fused_file_are_read(tmp_path):
    target = find_target("vllm-omni")
    target.write(packed_source({"a": nvfp4()}, torch.bfloat16), tmp_path)
    before, tensors = target.read(tmp_path).layers["a"], load_file(tmp_path / WEIGHTS)
    tensors["a.wcscales"] = torch.arange(1, 129).bfloat16()
    save_file(tensors, tmp_path / WEIGHTS)
    found = dequantize(target.read(tmp_path).layers["a"].weight)
    whole = tensors["a.wtscale"].float() / before.weight.tensor_scale
    expected = dequantize(before.weight) * torch.arange(1.0, 129)[:, None] * whole
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("rows_", "columns"), [(1, 1), (128, 4), (130, 9), (300, 3)])
def test_tiles_hold_every_scale_at_the_place_of_cublas(rows_, columns):
    scales = torch.arange(rows_ * columns).view(rows_, columns).to(torch.uint8)
    tiles = to_tiles(scales)
    assert torch.equal(from_tiles(tiles, rows_, columns), scales)
    flat, across = tiles.flatten(), -(-columns // 4)
    for r in {0, rows_ // 2, rows_ - 1}:
        for c in range(columns):
            tile, row = r // 128 * across + c // 4, r % 128
            assert flat[512 * tile + 16 * (row % 32) + 4 * (row // 32) + c % 4] == scales[r, c]
