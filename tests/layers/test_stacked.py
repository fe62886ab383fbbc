"""The GPU's form of the equation against the definition, on a simulated device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from loraq.formats import get_format
from loraq.layers import QuantizedLinear
from loraq.layers.backends import Emulated
from loraq.layers.shared_input import share_inputs
from loraq.transforms import InputTransform
from tests.kernels.layers import RECIPES, random_input, random_layer
from tests.simulated import simulated_cuda

WIDTH = 192
CASES = {
    "shared formats": ("int8", {}, {}),
    "two formats": ("int4, W4A8 branch", {}, {}),
    "no branch": ("nvfp4", {"rank": 0}, {}),
    "a branch in bf16": ("int4, bf16 branch", {"requantize": False}, {}),
    "blocks that are no power of two": ("int4, int8 branch", {}, {"block": 48}),
    "no bias": ("mxfp4, mxfp8 branch", {"bias": False}, {}),
}


def packed(recipe: str, options: dict, activation: dict):
    tensors = random_layer(RECIPES[recipe], width=WIDTH, **options)
    signs = torch.where(torch.arange(WIDTH) % 3 == 0, -1, 1).to(torch.int8)
    smooth = torch.linspace(0.5, 2, WIDTH).bfloat16().float()
    if activation:
        tensors = replace(tensors, activation=get_format(tensors.activation.name, **activation))
    return replace(tensors, transform=InputTransform(smooth, signs, 64, 0.25))


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("convolution", [False, True])
def test_a_layer_in_bfloat16_is_near_the_definition(case, convolution):
    tensors = packed(*CASES[case])
    x = random_input(12, WIDTH).div(30).bfloat16()
    compute = Emulated(tensors, torch.bfloat16, torch.device("cpu"), operands=torch.bfloat16)
    turned = tensors.transform.to("cpu", torch.bfloat16).input(x)
    wanted = compute.multiply(compute.quantize(turned))
    if convolution:
        x, wanted = (t.view(2, 3, 2, -1).movedim(-1, 1).contiguous() for t in (x, wanted))
    with simulated_cuda(), torch.inference_mode():
        layer = QuantizedLinear(tensors, convolution).to("cuda")
        found = layer(x.cuda())
        assert found.dtype == torch.bfloat16 and found.shape == wanted.shape
        assert distance(found.cpu(), wanted) < 1e-2
        assert layer(x[:0].cuda()).shape == wanted[:0].shape


def test_layers_that_share_an_input_quantise_it_once():
    tensors = packed(*CASES["two formats"])
    of_group = [replace(tensors, bias_O=bias) for bias in (None, torch.ones(40))]
    x = random_input(12, WIDTH).bfloat16()
    with simulated_cuda(), torch.inference_mode():
        alone = [QuantizedLinear(part).to("cuda")(x.cuda()).cpu() for part in of_group]
        layers = [QuantizedLinear(part) for part in of_group]
        share_inputs(layers)
        there = x.cuda()
        together = [layer(there).cpu() for layer in nn.ModuleList(layers).to("cuda")]
        assert layers[0].shared is layers[1].shared is not None
        assert all(map(torch.equal, together, alone))


def test_float32_keeps_the_definition_s_products():
    tensors, x = random_layer(RECIPES["int8"]), random_input(9, 200)
    wanted = tensors.forward(x)
    with simulated_cuda(), torch.inference_mode():
        assert torch.equal(QuantizedLinear(tensors).to("cuda")(x.cuda()).cpu(), wanted)
