"""W&B: what an offline run holds, read back from its own log; failures cost a warning only."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import loraq
from loraq.errors import LoraqError
from loraq.record import Record
from loraq.tracking import TrackedImage, Tracker
from loraq.tracking.contents import summary_of
from loraq.tracking.tracker import PATIENCE, written

RECORD = Record(
    key="0123456789abcdef",
    experiment="demo",
    row="loraq_o2_int8",
    label="LoRaQ O2",
    config={"method": "loraq_o2", "quant": {"branch": {"rank": None, "budget": 0.64}}},
    model_hash="ab",
    budget={"bits_per_weight": 4.89, "rank": 19, "nbytes": 1234},
    layers=[
        {"layer": "blocks.0.a", "role": "ff_up", "weight_error": 0.1, "output_error": 0.04},
        {"layer": "blocks.0.b", "role": "ff_down", "weight_error": 0.2, "output_error": 0.06},
    ],
    images={"hash": "cd", "names": ["x", "y"], "seen": [True, False]},
    metrics={
        "psnr": {
            "value": 30.5,
            "lo": 30.0,
            "hi": 31.0,
            "per_image": [30.0, 31.0],
            "seen": {"value": 30.0},
        },
        "fd_efflite0": {"value": 12.0, "lo": None, "hi": None, "per_image": None},
    },
    timings={"generate": 3.5},
)


def log_records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: a 7-byte head, then LevelDB's log format in 32 KiB blocks."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    place, whole = 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or last part
            yield wandb_internal_pb2.Record.FromString(whole)
            whole = b""


def items(entries) -> dict[str, Any]:
    named = {".".join(entry.nested_key) or entry.key: entry.value_json for entry in entries}
    return {name: json.loads(value) for name, value in named.items()}


def test_an_offline_run_holds_config_metrics_errors_and_images(tmp_path: Path, capfd):
    paths = []
    for i in range(2):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(np.full((16, 16, 3), 100 * i, np.uint8)).save(paths[-1])
    images = [
        TrackedImage("x", "a red x", paths[0], paths[1]),
        TrackedImage("y", "a y", paths[1], None),
    ]
    folder = Tracker(tmp_path).record(RECORD, images)
    assert folder is not None and folder.name.startswith("offline-run-")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")  # quiet console

    found = list(log_records(folder / f"run-{RECORD.key}.wandb"))
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.run_group, run.job_type) == (RECORD.key, "demo", "loraq_o2")
    assert (run.display_name, run.project) == ("LoRaQ O2", "loraq")
    config = items(run.config.update)
    assert config["quant"] == {"branch": {"rank": None, "budget": 0.64}}
    assert config["record"]["model_hash"] == "ab"
    summary: dict[str, Any] = {}
    for record in found:
        if record.WhichOneof("record_type") == "summary":
            summary.update(items(record.summary.update))
    assert summary["psnr"] == 30.5 and summary["psnr/lo"] == 30.0 and summary["psnr/seen"] == 30.0
    assert summary["budget/rank"] == 19 and summary["output_error"] == pytest.approx(0.05)
    assert "fd_efflite0/lo" not in summary
    tables = {
        path.name.split("_")[0]: json.loads(path.read_text())
        for path in folder.rglob("*.table.json")
    }
    assert tables["layers"]["data"][1] == ["blocks.0.b", "ff_down", 0.2, 0.06]
    assert tables["images"]["columns"] == ["name", "prompt", "image", "reference", "psnr"]
    assert tables["images"]["data"][1] == ["y", "a y", "Image", None, 31.0]
    staged = [
        path.read_bytes() for path in (tmp_path / "wandb" / "data").rglob("*") if path.is_file()
    ]
    assert all(path.read_bytes() in staged for path in paths)  # the pictures, for a later sync
    assert "WANDB_DATA_DIR" not in os.environ
    assert any(record.WhichOneof("record_type") == "exit" for record in found)

    assert written(RECORD.key, tmp_path, "offline") == folder
    assert Tracker(tmp_path).record(RECORD) == folder  # not written twice
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


def test_an_overview_has_all_rows_and_the_trade_of_quality_against_memory(tmp_path: Path):
    other = replace(RECORD, key="fedcba9876543210", row="rtn", label="RTN", budget={})
    picture = tmp_path / "grid.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    folder = Tracker(tmp_path).overview([RECORD, other], [picture])
    assert folder is not None
    found = list(log_records(next(folder.glob("*.wandb"))))
    run = next(record.run for record in found if record.WhichOneof("record_type") == "run")
    assert (run.run_group, run.job_type) == ("demo", "overview")
    rows = json.loads(next(folder.rglob("rows_*.table.json")).read_text())
    values = [dict(zip(rows["columns"], line, strict=True)) for line in rows["data"]]
    assert [line["bits_per_weight"] for line in values] == [4.89, None]
    assert values[0]["psnr"] == 30.5 and values[0]["psnr/hi"] == 31.0
    logged = {
        ".".join(item.nested_key): json.loads(item.value_json)
        for record in found
        if record.WhichOneof("record_type") == "history"
        for item in record.history.item
    }
    assert logged["pareto_psnr_table.path"] == logged["rows.path"]
    assert next(folder.rglob("grid_*.png")).read_bytes() == picture.read_bytes()
    assert Tracker(tmp_path).overview([RECORD, other]) == folder


def test_where_wandb_does_not_answer_runs_are_written_offline(tmp_path: Path, monkeypatch):
    """A closed port of this machine stands for a network that is away."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("loraq.tracking.tracker.PATIENCE", 2.0)
    tracker = Tracker(tmp_path, "online")
    with pytest.warns(UserWarning, match=r"does not answer.*wandb sync"):
        folder = tracker.record(RECORD)
    assert folder is not None and folder.name.startswith("offline-run-")
    assert not list(tmp_path.glob("wandb/run-*"))  # nothing half-written
    began = time.monotonic()
    other = tracker.record(replace(RECORD, key="fedcba9876543210"))
    assert other is not None and other.name.startswith("offline-run-")
    assert time.monotonic() - began < PATIENCE  # it did not try again
    with pytest.warns(UserWarning, match="does not answer"):
        assert Tracker(tmp_path, "online").record(RECORD) == folder


def test_a_failure_is_a_warning(tmp_path: Path, monkeypatch):
    import wandb

    def broken(**given):
        raise RuntimeError("no W&B today")

    monkeypatch.setattr(wandb, "init", broken)
    with pytest.warns(UserWarning, match="no W&B today.*record is safe"):
        assert Tracker(tmp_path).record(RECORD) is None
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="record is safe"):
        assert Tracker(tmp_path / "file").record(RECORD) is None


def test_disabled_does_nothing_and_unknown_modes_are_answered(tmp_path: Path):
    assert Tracker(tmp_path / "none", "disabled").record(RECORD) is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(LoraqError, match="offline"):
        Tracker(tmp_path, "offlin")


def test_summary_is_flat_and_finite():
    summary = summary_of(RECORD)
    assert all(isinstance(value, int | float) for value in summary.values())
    assert summary["n"] == 2 and summary["seconds/generate"] == 3.5


def test_wandb_is_imported_here_alone_and_only_when_used():
    package = Path(loraq.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "import wandb" in path.read_text()]
    assert users == ["tracker.py"]
    code = "import sys, loraq.tracking; assert not {'wandb', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
