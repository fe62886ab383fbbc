"""The bench of quantising compares with a way that reaches the same error, for every branch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.bench.quantise import METHODS, SAME_ERROR, reference_way, weight_error
from loraq import recipe
from loraq.quantizer import quantize_model
from tests.quantize.toy import Toy, toy_layers


@pytest.mark.parametrize("method", METHODS)
def test_full_svds_one_by_one_end_at_the_same_error(method):
    chosen = recipe(*METHODS[method])
    if chosen.branch.kind != "none":
        chosen = replace(chosen, branch=replace(chosen.branch, rank=4))
    model, layers = Toy(), toy_layers()
    ours = quantize_model(model, layers, chosen, progress=None)
    with reference_way():
        theirs = quantize_model(model, layers, chosen, progress=None)
    assert len(theirs.info) >= len(ours.info)
    assert weight_error(ours, model) == pytest.approx(weight_error(theirs, model), rel=SAME_ERROR)
