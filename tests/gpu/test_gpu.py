"""The check of a GPU, on a CPU: its paths, its time limits, its record and the tables made of it.

Takes one item of each kind; `make test-gpu DRY=1` takes every path.
"""

from __future__ import annotations

import json
import re

import pytest

from experiments.bench import kernel_costs
from loraq.errors import LoraqError
from loraq.results.pages import gpu
from loraq.utils.assets import CHECKOUT
from tests.gpu import __main__ as check
from tests.gpu import right, speed
from tests.gpu.setting import Item, Setting
from tests.simulated import simulated_cuda

KEPT = {
    "right": ("kernel: int4, W4A8 branch, odd shape", "quantiser: int4", "again: kernel.*"),
    "blocks": ("a block of pixart_sigma, 1 images",),
    "quantising": ("quantise sana_1_6b by svdquant",),
    "loops": ("20 steps of .*, 16-bit, 2 images",),
    "together": (),
}
"""Items of the dry run that this suite takes."""


def kept(part: check.Part) -> check.Part:
    def items(setting):
        for item in part.items(setting):
            if any(re.fullmatch(pattern, item.name) for pattern in KEPT[part.name]):
                yield item

    return check.Part(part.name, part.share, items)


def test_a_short_dry_run_fills_the_record_and_the_tables(tmp_path, monkeypatch):
    every = speed.builders()
    few = ("16-bit", "int4, W4A8 branch, emulated", "int4, W4A8 branch, kernels")
    monkeypatch.setattr(speed, "builders", lambda: {name: every[name] for name in few})
    output = tmp_path / "results" / "bench" / "gpu.json"
    output.parent.mkdir(parents=True)
    run = check.Check(Setting(dry=True), minutes=5, output=output)
    run.run([kept(part) for part in check.parts()])
    assert not run.failed()
    found = json.loads(output.read_text())
    for part, patterns in KEPT.items():
        assert len(found["parts"][part]["rows"]) >= len(patterns)
        assert not found["parts"][part]["skipped"]
    (block,) = found["parts"]["blocks"]["rows"]
    assert set(block["ways"]) == set(few) and not block["failed"]
    assert kernel_costs.measured(found)["int"].keys() == {"kernels", "emulation"}
    with pytest.raises(LoraqError, match="dry run"):
        gpu.gpu_block("blocks", tmp_path)
    found["settings"]["dry"] = False
    output.write_text(json.dumps(found))
    for part in gpu.PARTS:
        lines = gpu.gpu_block(part, tmp_path).splitlines()
        assert len([line for line in lines if line.startswith("|")]) >= 2 + len(KEPT[part])
    assert set(gpu.PARTS) == {part.name for part in check.parts()}


def test_nothing_mixes_devices_or_stays_on_the_host(monkeypatch):
    """The parts on the simulated CUDA device, which has no Triton: what runs without kernels."""
    every = speed.builders()
    few = ("16-bit", "nvfp4, mxfp8 branch, emulated")
    monkeypatch.setattr(speed, "builders", lambda: {name: every[name] for name in few})
    setting = Setting(dry=True, simulated=True)
    with simulated_cuda() as device:
        assert right.quantizer(setting, "int4")["holds"]
        assert not speed.block(setting, "pixart_sigma", 1)["failed"]
        assert speed.quantise(setting, "sana_1_6b", "svdquant")["blocks"] == 2
        assert speed.loop(setting, "sana_1_6b", few[1], 2)["images"] == 2
    assert device.waits  # the synchronisations of the measurement at least


def run_items(calls, minutes, output=None):
    part = check.Part("right", 1.0, lambda _setting: (Item(n, call) for n, call in calls.items()))
    run = check.Check(Setting(dry=True), minutes, output)
    run.run([part])
    return run


def test_what_fails_or_does_not_hold_is_named_and_the_rest_runs(tmp_path, capsys):
    def broken():
        raise RuntimeError("the kernel\nhas a fault")

    calls = {"a": broken, "b": lambda: {"holds": False}, "c": lambda: {"holds": True}}
    run = run_items(calls, 5, tmp_path / "gpu.json")
    assert [line.partition(":")[0] for line in run.failed()] == ["a", "b"]
    rows = json.loads((tmp_path / "gpu.json").read_text())["parts"]["right"]["rows"]
    assert rows[0]["error"] == "RuntimeError: the kernel" and rows[2]["holds"]


def test_what_does_not_fit_into_the_time_is_skipped_and_named(capsys):
    run = run_items({"a": lambda: {"holds": True}}, 0)
    assert run.found["right"] == {"rows": [], "skipped": ["a"]}
    assert "skipped: a" in capsys.readouterr().out


def test_the_items_are_listed_without_running(capsys):
    assert check.main(["--list"]) == 0
    out = capsys.readouterr().out
    assert all(part.name in out for part in check.parts())
    assert "20 steps of sana_1_6b" in out and "16 images" in out
    with pytest.raises(LoraqError, match="loops"):
        check.main(["--dry", "--only", "lops"])


def test_without_a_gpu_the_check_says_what_to_do():
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(LoraqError, match="DRY=1"):
        check.main(["--output", "nothing.json"])


def test_until_a_gpu_is_measured_the_pages_say_so(tmp_path):
    for part in gpu.PARTS:
        assert "Not yet measured" in gpu.gpu_block(part, tmp_path)
    with pytest.raises(LoraqError, match="blocks"):
        gpu.gpu_block("bocks", CHECKOUT)
