"""comfy-kitchen's natural order: tensors, strict reading, refusals."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq.errors import LoraqError
from loraq.formats import get_format
from loraq.layouts.engine_layer import engine_layer
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS
from loraq.layouts.targets import find_target
from loraq.transforms import InputTransform
from tests.layouts.layers import difference, packed_layer, packed_source, rows

TARGET = find_target("comfy-kitchen")


def written(folder, **layers):
    source = packed_source(layers or {"a": packed_layer(), "b": packed_layer(rank=20, shift=True)})
    TARGET.write(source, folder)
    return source, load_file(folder / WEIGHTS)


def test_tensors_hold_our_codes_and_transposed_scales(tmp_path):
    source, tensors = written(tmp_path)
    weight = source.layers["a"].weight
    assert torch.equal(tensors["a.weight"].view(torch.uint8), weight.codes)
    assert torch.equal(tensors["a.weight_scale"], weight.scale.T)
    assert tensors["a.weight_proj_down"].shape == tensors["b.weight_proj_down"].shape == (128, 32)
    assert tensors["a.bias"].dtype == torch.float16 and "plain.weight" in tensors


def test_what_is_read_computes_what_was_packed(tmp_path):
    source, _ = written(tmp_path, a=packed_layer(), b=packed_layer(shift=True))
    assert TARGET.detect(tmp_path)
    contents = TARGET.read(tmp_path)
    assert list(contents.layers) == ["a", "b"]
    assert set(contents.others) == {"plain.weight", "plain.bias"}
    for name, layer in source.layers.items():
        x, read = rows(after_gelu=name == "b"), EngineLinear(contents.layers[name])
        assert difference(read(x), layer.forward(x)) < 1e-2
        wanted = EngineLinear(engine_layer(layer, contents.layers[name].activation, torch.float16))
        buffers = dict(read.named_buffers())
        for buffer, tensor in wanted.named_buffers():  # equal to the bit
            assert torch.equal(buffers.pop(buffer), tensor)
        assert not buffers and torch.equal(read(x), wanted(x))


def test_reading_is_strict(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    _, tensors = written(folder)
    file = tmp_path / "a.safetensors"
    wrong = {
        "'a.weight_scale' is missing": {"a.weight_scale": None},
        r"'a.weight_scales' is no tensor of this layout. Did you mean weight_scale": {
            "a.weight_scales": torch.ones(1)
        },
        r"'a.bias' is \(3,\) of torch.float16, and this layout has \(128,\)": {
            "a.bias": torch.ones(3).half()
        },
        r"'a.weight_scale' is .*float32, and this layout has .*float16": {
            "a.weight_scale": tensors["a.weight_scale"].float()
        },
    }
    for message, changes in wrong.items():
        held = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(held, file, {"svdquant_w4a4": '{"act_unsigned": ["b"]}'})
        with pytest.raises(LoraqError, match=message):
            TARGET.read(file)


def test_a_file_that_does_not_say_which_layers_are_unsigned_is_read_with_a_warning(
    tmp_path, caplog
):
    folder = tmp_path / "x"
    folder.mkdir()
    _, tensors = written(folder)
    save_file(tensors, tmp_path / "a.safetensors")
    logging.getLogger("loraq").propagate = True
    with caplog.at_level(logging.WARNING, "loraq"):
        assert TARGET.read(tmp_path / "a.safetensors").layers["b"].shift == 0
    assert "act_unsigned" in caplog.text
    for said, message in (
        ('{"act_unsigned": ["c"]}', "act_unsigned names 'c'"),
        ("[1", "no JSON object as 'svdquant_w4a4'"),
    ):
        save_file(tensors, tmp_path / "a.safetensors", {"svdquant_w4a4": said})
        with pytest.raises(LoraqError, match=message):
            TARGET.read(tmp_path / "a.safetensors")


def test_what_the_layout_cannot_express_is_refused():
    rotated = replace(
        packed_layer(),
        transform=InputTransform(signs_I=torch.ones(128, dtype=torch.int8), block=64),
    )
    cases = {
        "rotated.*loraq_export": rotated,
        "is nvfp4. .*weight=int4": packed_layer(weight="nvfp4"),
        "int4 g32": packed_layer(block=32),
        "96 inputs are no multiple of 64": packed_layer(width=96),
        "shifted by 0.5.*shift=false": replace(packed_layer(), transform=InputTransform(shift=0.5)),
    }
    for message, layer in cases.items():
        with pytest.raises(AssertionError, match=message):
            raise AssertionError(TARGET.refuse(packed_source({"a": layer}), "a"))
    source = packed_source({"a": packed_layer(shift=True)})
    assert TARGET.refuse(source, "a") is None
    source.network["a"].convolution = True
    assert "1×1 convolution" in TARGET.refuse(source, "a")


def test_losses_say_what_a_reader_must_be_told():
    source = packed_source({"a": packed_layer(shift=True, branch="int8", activation="uint4")})
    text = "\n".join(TARGET.losses(source))
    assert "inputs of" not in text
    wide = replace(packed_layer(activation="int8"), branch_activation=get_format("int8"))
    other = packed_source({"a": wide, "b": packed_layer(shift=True)})
    said = "\n".join(TARGET.losses(other))
    assert "The inputs of 1 layers are rounded to int4 g64, not to int8 g64" in said
    assert "The branch's input and its intermediate are no longer rounded" in said
    assert "act_unsigned" in text and "widened from int8 g64 to float16" in text
    assert "Block scales" not in text
    assert "Block scales" in "\n".join(TARGET.losses(replace(source, dtype=torch.bfloat16)))


def test_an_unknown_layout_is_answered_with_near_matches():
    with pytest.raises(LoraqError, match="Did you mean 'comfy-kitchen'"):
        find_target("comfykitchen")
