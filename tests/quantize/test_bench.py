"""The bench of quantising compares with a way that reaches the same error, for every branch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch.nn.functional import mse_loss

from experiments.bench.quantise import METHODS, reference_way
from loraq import recipe
from loraq.quantizer import quantize_model
from tests.quantize.toy import Toy, toy_layers


@pytest.mark.parametrize("method", METHODS)
def test_full_svds_one_by_one_give_the_same_layers(method):
    chosen = recipe(*METHODS[method])
    if chosen.branch.kind != "none":
        chosen = replace(chosen, branch=replace(chosen.branch, rank=4))
    model, layers = Toy(), toy_layers()
    ours = quantize_model(model, layers, chosen, progress=None)
    with reference_way():
        theirs = quantize_model(model, layers, chosen, progress=None)
    assert len(theirs.info) >= len(ours.info)
    for name, tensors in ours.layers.items():
        own, other = tensors.effective_weight(), theirs.layers[name].effective_weight()
        weight = model.get_submodule(name).weight
        assert abs(mse_loss(own, weight) / mse_loss(other, weight) - 1) < 0.02
