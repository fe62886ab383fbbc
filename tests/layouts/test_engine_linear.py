"""The emulated layer of an engine computes what the packed layer does, up to its 16-bit types."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loraq.errors import LoraqError
from loraq.formats import get_format
from loraq.layers.linear import QuantizedLinear
from loraq.layouts.engine_layer import engine_layer
from loraq.layouts.engine_linear import EngineLinear, round_activation
from loraq.transforms import InputTransform
from tests.layouts.layers import difference, packed_layer, rows
from tests.simulated import simulated_cuda

INT4, UINT4 = get_format("int4"), get_format("uint4")
NVFP4 = get_format("nvfp4", tensor_scale="fixed")
CASES = {
    "int4": ({}, INT4),
    "shifted": ({"shift": True}, UINT4),
    "no branch": ({"rank": 0}, INT4),
    "no smoothing": ({"smooth": False}, INT4),
    "nvfp4": ({"weight": "nvfp4"}, NVFP4),
    "mxfp4": ({"weight": "mxfp4_e2m1"}, get_format("mxfp4_e2m1")),
}


@pytest.mark.parametrize(("settings", "activation"), CASES.values(), ids=CASES)
@pytest.mark.parametrize("branch_input", ["raw", "smoothed"])
def test_the_emulated_layer_differs_by_16_bit_rounding_alone(settings, activation, branch_input):
    layer = packed_layer(**settings)
    x = rows(after_gelu=bool(layer.transform.shift))
    engine = EngineLinear(engine_layer(layer, activation, torch.float16, branch_input=branch_input))
    assert difference(engine(x), QuantizedLinear(layer)(x)) < 1.5e-2


def test_the_bias_gives_back_what_the_shift_added_to_the_branch():
    layer, x = packed_layer(shift=True), rows(after_gelu=True)
    right = engine_layer(layer, UINT4, torch.float16)
    without = replace(right, bias_O=layer.bias_O.half())
    assert difference(EngineLinear(without)(x), layer.forward(x)) > 5e-2
    assert difference(EngineLinear(right)(x), layer.forward(x)) < 1e-2


def test_a_convolution_is_the_same_layer_on_pixels():
    layer = engine_layer(packed_layer(), INT4, torch.float16)
    x = rows(count=2 * 3 * 5).view(2, 3, 5, 128)
    pixels = EngineLinear(layer, convolution=True)(x.movedim(-1, 1))
    assert torch.equal(pixels.movedim(1, -1), EngineLinear(layer)(x))


def test_moving_and_casting_a_model_keeps_the_types_of_the_file():
    module = EngineLinear(engine_layer(packed_layer(weight="nvfp4"), NVFP4, torch.float16))
    x, dtypes = rows(), {name: t.dtype for name, t in module.named_buffers()}
    before = module(x)
    moved = module.to("meta")
    assert moved.layer.weight.codes.is_meta and moved.layer.down_IR.is_meta
    module = EngineLinear(engine_layer(packed_layer(weight="nvfp4"), NVFP4, torch.float16))
    module.double().bfloat16()
    assert {name: t.dtype for name, t in module.named_buffers()} == dtypes
    assert torch.equal(module(x), before)


def test_on_a_gpu_nothing_waits_for_the_host():
    layer = engine_layer(packed_layer(weight="nvfp4", shift=True), NVFP4, torch.bfloat16)
    expected = EngineLinear(layer)(x := rows())
    with simulated_cuda() as device:
        found = EngineLinear(layer).to("cuda")(x.to("cuda"))
        assert not device.waits
    assert torch.equal(found.cpu(), expected)


def test_integers_are_rounded_in_the_type_of_the_input():
    x = torch.tensor([[1.0, -0.5, 0.25, 7.0]], dtype=torch.bfloat16)
    fmt = get_format("int4", 4)
    assert round_activation(x, fmt).tolist() == [[1.0, 0.0, 0.0, 7.0]]  # ties to even
    assert round_activation(torch.zeros_like(x), fmt).tolist() == [[0.0] * 4]
    third = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16)  # 1/7 is 0.14257812 in bfloat16
    assert round_activation(third, get_format("int4", 2))[0, 0] == 7 * 0.142578125


def test_a_static_scale_is_that_of_the_file():
    x, fmt = rows().half(), replace(NVFP4, tensor_scale="tensor")
    dynamic = x.float().abs().max() / (6 * 448)
    assert torch.equal(round_activation(x, NVFP4, dynamic), round_activation(x, fmt))
    small = round_activation(x, NVFP4, dynamic / 4)
    assert small.abs().max() <= 6 * 448 * dynamic / 4 < x.abs().max()  # saturates


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [None, 1.0])
def test_inputs_of_zeros_and_without_a_value_are_rounded_block_by_block(dtype, scale):
    fmt, given = replace(NVFP4, tensor_scale="tensor"), None if scale is None else torch.ones(())
    zeros = torch.zeros(2, 40, dtype=dtype)
    assert torch.equal(round_activation(zeros, fmt, given), torch.zeros(2, 40))
    for value in (torch.nan, torch.inf):
        x = torch.ones(2, 40, dtype=dtype)
        x[1, 17] = value
        missing = round_activation(x, fmt, given).isnan()
        assert missing[1, 16:32].all() and missing.sum() == (80 if scale is None else 16)


def test_what_16_bits_cannot_hold_is_refused():
    layer = packed_layer()
    tiny, small, large = (
        replace(layer, transform=InputTransform(layer.transform.smooth_I * factor))
        for factor in (1e-8, 5e-5, 2e4)  # with the inverse of the last, float16 loses precision
    )
    for wrong in (tiny, small, large):
        with pytest.raises(LoraqError, match=r"smoothing scales reach .*dtype=bfloat16"):
            engine_layer(wrong, INT4, torch.float16)
        assert engine_layer(wrong, INT4, torch.bfloat16).smooth_I.min() > 0
    signs = torch.ones(128, dtype=torch.int8)
    rotated = replace(layer, transform=InputTransform(signs_I=signs, block=64))
    with pytest.raises(LoraqError, match="rotated"):
        engine_layer(rotated, INT4, torch.float16)


def test_a_padded_rank_changes_nothing():
    layer = engine_layer(packed_layer(rank=5), INT4, torch.float16)
    padded, x = layer.of_rank(16), rows()
    assert padded.down_IR.shape == (128, 16) and padded.up_OR.shape == (128, 16)
    assert difference(EngineLinear(padded)(x), EngineLinear(layer)(x)) < 1e-3
    with pytest.raises(LoraqError, match="rank 5 does not fit into rank 4"):
        layer.of_rank(4)
