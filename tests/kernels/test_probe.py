"""Kernels that compute something else than the emulation are found at the first layer."""

from __future__ import annotations

import pytest
import torch

from loraq.layers.backends import make_compute
from loraq.layers.triton import PreparedLayer, Unsupported, probe
from tests.kernels.layers import DEVICE, RECIPES, random_layer


def test_wrong_kernels_are_refused(monkeypatch, caplog):
    tensors = random_layer(RECIPES["int4, W4A8 branch"])
    monkeypatch.setattr(probe, "_agreeing", set())
    made = make_compute("triton", tensors, torch.float32, DEVICE)
    assert isinstance(made, PreparedLayer) and len(probe._agreeing) == 1
    probe._agreeing.clear()
    right = PreparedLayer.multiply
    monkeypatch.setattr(PreparedLayer, "multiply", lambda self, x: right(self, x).roll(1, -1))
    with pytest.raises(Unsupported, match=r"of the output's norm \(limit 0.05\).*compute=emulate"):
        make_compute("triton", tensors, torch.float32, DEVICE)
    monkeypatch.setattr(PreparedLayer, "multiply", lambda self, x: 1 / 0)
    with pytest.raises(Unsupported, match=r"fail \(ZeroDivisionError"):
        make_compute("triton", tensors, torch.float32, DEVICE)
    assert "please report" in caplog.text and not probe._agreeing
