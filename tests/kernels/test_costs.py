"""compute=auto takes kernels only where the table of costs says that they are faster."""

from __future__ import annotations

import json

import pytest
import torch

from experiments.bench import kernel_costs
from loraq.layers import kernel_costs as costs
from loraq.layers.backends import Emulated, make_compute
from loraq.layers.kernel_costs import kernels_are_faster, read_costs
from loraq.layers.triton import PreparedLayer
from tests.kernels.layers import RECIPES, random_layer
from tests.simulated import simulated_cuda

INT4 = RECIPES["int4, int8 branch"]


def test_the_modelled_rows_follow_from_the_committed_counts():
    table = json.loads(costs.TABLE.read_text())
    wanted = kernel_costs.modelled(json.loads(kernel_costs.COUNTS.read_text())["now"])
    for target, origin in table["origins"].items():
        if origin.startswith("modelled"):
            assert table["costs"][target] == wanted[target]


@pytest.mark.parametrize("name, like", [("sm86", "sm80"), ("sm103", "sm100"), ("sm120", "sm100")])
def test_an_architecture_that_is_not_listed_counts_as_the_one_before_it(name, like):
    for mode, row in read_costs()[like].items():
        assert kernels_are_faster(mode, name) == (row["kernels"] < row["emulation"])


def test_before_the_first_and_without_a_row_emulation_is_used():
    assert not kernels_are_faster("int", "sm75") and not kernels_are_faster("int", "gfx90a")
    assert not kernels_are_faster("scaled", "sm90") and not kernels_are_faster("int", "xe2")


@pytest.mark.parametrize("faster", [True, False])
def test_auto_follows_the_table(faster, monkeypatch):
    row = {"kernels": 1.0, "emulation": 2.0 if faster else 0.9}
    monkeypatch.setattr(costs, "read_costs", lambda: {"sm90": {"int": row}})
    # no kernel can run on the simulated device
    monkeypatch.setattr("loraq.layers.triton.probe.check_agreement", lambda *kind: None)
    with simulated_cuda(capability=(9, 0)):
        device, tensors = torch.device("cuda:0"), random_layer(INT4)
        made = make_compute("auto", tensors, torch.float16, device)
        assert isinstance(made, PreparedLayer if faster else Emulated)
        assert isinstance(make_compute("triton", tensors, torch.float16, device), PreparedLayer)


def test_a_measured_record_replaces_a_row():
    def block(images: int, kernels: float) -> dict:
        ratios = {"16-bit": 1.0, "int4, W4A8 branch, emulated": 2.5}
        ratios["int4, W4A8 branch, kernels"] = kernels
        return {"images": images, "ways": {name: {"ratio": r} for name, r in ratios.items()}}

    rows = [block(1, 9.0), block(16, 1.0), block(16, 2.0), {"error": "no", "holds": False}]
    found = kernel_costs.measured({"parts": {"blocks": {"rows": rows}}}, "sm90")
    assert found == {"int": {"kernels": 1.5, "emulation": 2.5}}
