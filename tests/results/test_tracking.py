"""W&B: contents of runs, read and sent by wandb itself; failures are warnings."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import loraq
from loraq.errors import LoraqError
from loraq.results.record import Record, to_json
from loraq.results.tracking import TrackedImage, Tracker
from loraq.results.tracking.contents import run_summary
from loraq.results.tracking.tracker import find_finished_run
from tests.wandb_server import Arrived, serve

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


@pytest.fixture
def server():
    with serve() as arrived:
        yield arrived


@pytest.fixture
def online(server, monkeypatch):
    """Use the local server as W&B. wandb reads its environment once per process, hence teardown."""
    import wandb

    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield server
    wandb.teardown()


def shown(folder: Path) -> list[TrackedImage]:
    """Images of two prompts; the second has no image of the 16-bit model."""
    paths = [folder / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((16, 16, 3), 100 * i, np.uint8)).save(path)
    return [TrackedImage("x", "a red x", *paths), TrackedImage("y", "a y", paths[1])]


def runs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("wandb/*run-*") if not path.is_symlink())


def assert_run_has_record(server: Arrived, images: list[TrackedImage]) -> None:
    run = server.runs[RECORD.key]
    assert (run["groupName"], run["jobType"]) == ("demo", "loraq_o2")
    assert (run["displayName"], run["project"]) == ("LoRaQ O2", "loraq")
    config = server.config(RECORD.key)
    assert {name: config[name] for name in RECORD.config} == RECORD.config
    assert config["record"]["model_hash"] == "ab"
    summary = server.summary(RECORD.key)
    assert {name: summary[name] for name in run_summary(RECORD)} == run_summary(RECORD)
    assert "fd_efflite0/lo" not in summary
    layers = server.table(RECORD.key, "layers")
    rows = [dict(zip(layers["columns"], line, strict=True)) for line in layers["data"]]
    assert rows == RECORD.layers
    table = server.table(RECORD.key, "images")
    assert table["columns"] == ["name", "prompt", "image", "reference", "psnr"]
    assert [line[:2] + line[4:] for line in table["data"]] == [
        ["x", "a red x", 30.0],
        ["y", "a y", 31.0],
    ]
    first, second = ([cell and cell["path"] for cell in line[2:4]] for line in table["data"])
    assert second[1] is None
    sent = [server.file(path) for path in (*first, second[0])]
    assert sent == [i.read_bytes() for i in (images[0].path, images[0].reference, images[1].path)]
    sent_record = server.file(f"{RECORD.key}/record.json").decode()
    assert sent_record == to_json(RECORD)
    assert server.finished[RECORD.key] == 0


def test_an_offline_run_synced_by_wandb_has_the_record(tmp_path: Path, server: Arrived, capfd):
    images = shown(tmp_path)
    folder = Tracker(tmp_path).record(RECORD, images)
    assert folder is not None and folder.name.startswith("offline-run-")
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")  # quiet console
    assert "WANDB_DATA_DIR" not in os.environ

    assert find_finished_run(RECORD.key, tmp_path, "offline") == folder
    assert Tracker(tmp_path).record(RECORD) == folder  # not written twice
    assert runs(tmp_path) == [folder.name]
    assert not server.runs

    server.sync(folder)
    assert_run_has_record(server, images)
    server.sync(folder)
    assert server.begun == [RECORD.key]


def test_an_online_run_has_the_record_and_is_sent_once(tmp_path: Path, online: Arrived):
    images = shown(tmp_path)
    folder = Tracker(tmp_path, "online").record(RECORD, images)
    assert folder is not None and folder.name.startswith("run-")
    assert_run_has_record(online, images)
    assert Tracker(tmp_path, "online").record(RECORD, images) == folder
    assert Tracker(tmp_path, "offline").record(RECORD, images) == folder
    assert online.begun == [RECORD.key] and runs(tmp_path) == [folder.name]


def test_an_unfinished_upload_is_written_offline(tmp_path: Path, online: Arrived, monkeypatch):
    monkeypatch.setattr("loraq.results.tracking.tracker.UPLOAD", 2.0)
    images = shown(tmp_path)
    online.breaking = True
    with pytest.warns(UserWarning, match=r"does not answer.*wandb sync"):
        folder = Tracker(tmp_path, "online").record(RECORD, images)
    assert folder is not None and folder.name.startswith("offline-run-")
    assert runs(tmp_path) == [folder.name]
    online.breaking = False
    online.sync(folder)
    assert_run_has_record(online, images)


def test_an_unfinished_run_is_replaced(tmp_path: Path):
    images = shown(tmp_path)
    picture = images[1].path.read_bytes()
    images[1].path.write_bytes(b"no picture")
    with pytest.warns(UserWarning, match="record is safe"):
        assert Tracker(tmp_path).record(RECORD, images) is None
    (begun,) = runs(tmp_path)
    images[1].path.write_bytes(picture)
    (tmp_path / "wandb" / begun).rename(tmp_path / "wandb" / f"offline-run-0-{RECORD.key}")
    folder = Tracker(tmp_path).record(RECORD, images)
    assert folder is not None and runs(tmp_path) == [folder.name]


def test_an_overview_has_all_rows_and_quality_against_memory(tmp_path: Path, server: Arrived):
    other = replace(RECORD, key="fedcba9876543210", row="rtn", label="RTN", budget={})
    picture = tmp_path / "grid.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    folder = Tracker(tmp_path).overview([RECORD, other], [picture])
    assert folder is not None
    server.sync(folder)
    (run,) = server.runs
    assert server.runs[run]["groupName"] == "demo"
    assert server.runs[run]["jobType"] == "overview"
    rows = server.table(run, "rows")
    values = [dict(zip(rows["columns"], line, strict=True)) for line in rows["data"]]
    assert [line["bits_per_weight"] for line in values] == [4.89, None]
    assert values[0]["psnr"] == 30.5 and values[0]["psnr/hi"] == 31.0
    assert '"pareto_psnr"' in server.runs[run]["config"]
    assert server.summary(run)["pareto_psnr_table"]["path"] == server.summary(run)["rows"]["path"]
    assert server.file(server.summary(run)["grid"]["path"]) == picture.read_bytes()
    assert Tracker(tmp_path).overview([RECORD, other]) == folder


def test_runs_are_written_offline_if_wandb_does_not_answer(tmp_path: Path, monkeypatch):
    """A closed local port simulates a missing network."""
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("loraq.results.tracking.tracker.PATIENCE", 2.0)
    tracker = Tracker(tmp_path, "online")
    with pytest.warns(UserWarning, match=r"does not answer.*wandb sync"):
        folder = tracker.record(RECORD)
    assert folder is not None and folder.name.startswith("offline-run-")
    assert not list(tmp_path.glob("wandb/run-*"))  # nothing half-written
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other = tracker.record(replace(RECORD, key="fedcba9876543210"))
    assert other is not None and other.name.startswith("offline-run-")
    assert not [w for w in said if "does not answer" in str(w.message)]  # it did not try again
    with pytest.warns(UserWarning, match="does not answer"):
        assert Tracker(tmp_path, "online").record(RECORD) == folder


def test_a_full_disk_is_one_warning(small_disk: Path, tmp_path: Path, capfd):
    """W&B is not started: its service would print hundreds of lines."""
    with pytest.warns(UserWarning, match=r"Disk full while writing .*wandb.*record is safe"):
        assert Tracker(small_disk).record(RECORD, shown(tmp_path)) is None
    assert capfd.readouterr() == ("", "") and not runs(small_disk)


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


def test_disabled_does_nothing_and_unknown_modes_raise(tmp_path: Path):
    assert Tracker(tmp_path / "none", "disabled").record(RECORD) is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(LoraqError, match="offline"):
        Tracker(tmp_path, "offlin")


def test_summary_is_flat_and_finite():
    summary = run_summary(RECORD)
    assert all(isinstance(value, int | float) for value in summary.values())
    assert summary["n"] == 2 and summary["seconds/generate"] == 3.5


def test_wandb_is_imported_only_by_the_tracker_and_only_when_used():
    package = Path(loraq.__file__).parent
    users = [path.name for path in package.rglob("*.py") if "import wandb" in path.read_text()]
    assert users == ["tracker.py"]
    code = "import sys, loraq.results.tracking; assert not {'wandb', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
