"""An 8-bit branch in the file: exact where the layout has the same codes, otherwise measured."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from loraq.errors import LoraqError
from loraq.formats import dequantize
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS, read_metadata
from loraq.layouts.targets import find_target
from tests.layouts.layers import difference, packed_layer, packed_source, rows

SCHEMES = ("int8", "fp8_e4m3")


def made(branch, smooth=False, rank=20, **options):
    return packed_layer(weight="nvfp4", branch=branch, smooth=smooth, rank=rank, **options)


def round_trip(folder, scheme, layer):
    target = find_target(f"lowrank_quant_{scheme}")
    source = packed_source({"a": layer, "none": made("int8", rank=0)}, torch.bfloat16)
    target.write(source, folder)
    assert target.detect(folder)
    return target, source, target.read(folder).layers


@pytest.mark.parametrize(
    ("scheme", "branch"), [("int8", "mxint8"), ("int8", "int8"), ("fp8_e4m3", "mxfp8_e4m3")]
)
def test_a_branch_of_the_same_codes_is_kept(tmp_path, scheme, branch):
    layer = made(branch, branch_block=32)
    target, source, found = round_trip(tmp_path, scheme, layer)
    kept = load_file(tmp_path / WEIGHTS)
    assert kept["a.proj_down"].shape == (128, 32) and kept["a.proj_up"].shape == (128, 32)
    down_RI, up_OR = dequantize(layer.right), dequantize(layer.left)
    assert torch.equal(found["a"].down_IR.T[:20], down_RI.bfloat16())
    assert torch.equal(found["a"].up_OR[:, :20], up_OR.bfloat16())
    assert not found["none"].down_IR.any() and found["none"].rank == 32
    said = "\n".join(target.losses(source))
    assert "rounded again" not in said and "decoded to bfloat16" in said
    alone = packed_source({"none": source.layers["none"]}, torch.bfloat16)
    assert "decoded" not in "\n".join(target.losses(alone))
    assert torch.equal(dequantize(found["a"].weight), dequantize(layer.weight))  # fp32 scale
    x = rows()
    assert difference(EngineLinear(found["a"])(x), layer.forward(x)) < 3e-2
    metadata = read_metadata(tmp_path)
    assert metadata["lowrank_quant"] == scheme and metadata["model_class"] == "NunchakuModuleDict"
    assert json.loads(metadata["quantization_config"])["rank"] == 32


@pytest.mark.parametrize(("scheme", "limit"), [("int8", 0.01), ("fp8_e4m3", 0.04)])
def test_a_branch_that_is_rounded_again_says_by_how_much(tmp_path, scheme, limit):
    layer = made("int8", smooth=True)
    target, source, found = round_trip(tmp_path, scheme, layer)
    down_RI = layer.transform.weight_back(dequantize(layer.right))
    error = difference(found["a"].down_IR.T[:20].float(), down_RI)
    assert 1e-3 < error < limit
    text = "\n".join(target.losses(source))
    assert "of 2 factors of branches are rounded again" in text
    assert "no smoothing is kept" in text
    x = rows()
    assert difference(EngineLinear(found["a"])(x), layer.forward(x)) < 4e-2


def test_reading_is_strict(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    target, _, _ = round_trip(folder, "int8", made("int8"))
    tensors, metadata = load_file(folder / WEIGHTS), read_metadata(folder)
    wrong = {
        "'a.proj_up_scale' is missing": {"a.proj_up_scale": None},
        r"'a.proj_down' is .*float16, and this layout has .*int8": {
            "a.proj_down": tensors["a.proj_down"].half()
        },
        r"'a.proj_down_scale' is \(2, 32\)": {"a.proj_down_scale": torch.ones(2, 32)},
        "either wcscales or wtscale": {"a.wtscale": None},
    }
    for message, changes in wrong.items():
        held = {n: t for n, t in (tensors | changes).items() if t is not None}
        save_file(held, tmp_path / "a.safetensors", metadata)
        with pytest.raises(LoraqError, match=message):
            target.read(tmp_path / "a.safetensors")


def test_other_weights_are_refused():
    for scheme in SCHEMES:
        target = find_target(f"lowrank_quant_{scheme}")
        assert "format@quant.weight=nvfp4" in target.refuse(
            packed_source({"a": packed_layer()}), "a"
        )
        assert target.refuse(packed_source({"a": made("int8")}), "a") is None
