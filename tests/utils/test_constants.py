"""Kept tables survive a trace with fake tensors, and are not needed by it."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from loraq.formats.elements import IntegerElement
from loraq.transforms.hadamard import rotate


def decode(x):
    element = IntegerElement(8, fraction_bits=x.shape[-1].bit_length())
    return element.decode(x.to(torch.uint8))


def turn(x):
    return rotate(x, torch.ones(x.shape[-1], device=x.device), x.shape[-1])


@pytest.mark.parametrize("function", [decode, turn])
@pytest.mark.parametrize("first", ["fake", "real"])
def test_fake_and_real_tensors_in_any_order(function, first):
    width = {"fake": 2048, "real": 1024}[first]  # a table of its own, which nothing has built yet
    x = torch.rand(3, width)

    def fake():
        with FakeTensorMode() as mode:
            assert function(mode.from_tensor(x)).shape == x.shape

    calls = [fake, lambda: function(x)] if first == "fake" else [lambda: function(x), fake]
    for call in [*calls, calls[0]]:
        call()
    assert type(function(x)) is torch.Tensor


def test_a_table_that_inference_mode_builds_serves_autograd():
    x, signs = torch.randn(2, 512), torch.ones(512)
    with torch.inference_mode():
        wanted = rotate(x, signs, 512)
    learnt = x.clone().requires_grad_()
    found = rotate(learnt, signs, 512)
    found.sum().backward()
    assert torch.equal(found, wanted) and learnt.grad is not None
