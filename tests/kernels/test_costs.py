"""compute=auto takes kernels only where the table of costs says that they are faster."""

from __future__ import annotations

import json
from unittest.mock import patch

import pytest
import torch

from experiments.bench import kernel_costs
from loraq import recipe
from loraq.errors import LoraqError
from loraq.layers import kernel_costs as costs
from loraq.layers.backends import Emulated, make_compute
from loraq.layers.kernel_costs import kernels_are_faster, read_costs
from loraq.layers.triton import PreparedLayer, operands
from tests.gpu import speed
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


def block(images: int, kernels: float) -> dict:
    ratios = {"16-bit": 1.0, "int4, W4A8 branch, emulated": 2.5}
    ratios["int4, W4A8 branch, kernels"] = kernels
    return {"images": images, "ways": {name: {"ratio": r} for name, r in ratios.items()}}


def test_a_measured_record_replaces_a_row(tmp_path, monkeypatch):
    rows = [block(1, 9.0), block(16, 1.0), block(16, 2.0), {"error": "no", "holds": False}]
    record = {"settings": {"target": "sm90", "dry": False}, "parts": {"blocks": {"rows": rows}}}
    path, table = tmp_path / "gpu.json", tmp_path / "costs.json"
    path.write_text(json.dumps(record))
    table.write_text(costs.TABLE.read_text())
    monkeypatch.setattr(kernel_costs, "TABLE", table)
    kernel_costs.main(["--measured", str(path)])
    before, after = json.loads(costs.TABLE.read_text()), json.loads(table.read_text())
    assert after["costs"].pop("sm90")["int"] == {"kernels": 1.5, "emulation": 2.5}
    assert after["origins"].pop("sm90").startswith("measured (int)")
    del before["costs"]["sm90"], before["origins"]["sm90"]
    assert after == before
    record["settings"]["dry"] = True
    path.write_text(json.dumps(record))
    with pytest.raises(LoraqError, match="on a GPU"):
        kernel_costs.main(["--measured", str(path)])


@pytest.mark.parametrize("target", [*read_costs(), "sm103", "sm120"])
def test_the_check_of_a_gpu_times_a_recipe_of_every_mode(target):
    """By the modes that the kernels choose on that GPU."""
    modes = kernel_costs.mode_recipes(target)
    major = int(target[2:-1]) if target.startswith("sm") else 9
    with patch.object(operands, "multiplies_mx", lambda _: major >= 10 or target == "gfx950"):
        for mode, name in modes.items():
            (timed,) = (r for r in speed.RECIPES if r.startswith(name.partition(",")[0]))
            formats = recipe(*speed.RECIPES[timed]).formats()
            chosen = operands.choose_product(
                formats["activation"], formats["weight"], torch.device("cuda")
            )
            assert chosen.mode == mode
