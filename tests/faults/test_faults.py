"""The campaign sees what it looks for: files that are wrong, left over or made again."""

from __future__ import annotations

import json
import random
import shutil
import signal
import tempfile
import weakref
from pathlib import Path

import pytest

from loraq.runner.store import Store
from tests.faults import compare
from tests.faults.bench import Trial
from tests.faults.damaged import HOW, damage_one, judge
from tests.faults.processes import Ended, Fault, Running, run

IMAGE = "outputs/images/k/a.png"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with one finished product, an unfinished one and a table."""
    store = Store(tmp_path / "outputs")
    with store.write("images", "k", {"kind": "images", "seconds": 1.5}) as product:
        (product / "a.png").write_bytes(bytes(range(200)))
        (product / "b.png").write_bytes(bytes(range(100)))
        (product / "batches").mkdir()
        (product / "batches" / "00000.json").write_text('{"images": {"a": "x"}, "seconds": 2}')
    partial = tmp_path / "outputs" / "quantised" / "q.partial"
    partial.mkdir(parents=True)
    (partial / "group.safetensors").write_bytes(b"tensors")
    (tmp_path / "outputs" / "results").mkdir()
    (tmp_path / "outputs" / "results" / "main.md").write_text("| 1.5 |")
    return tmp_path


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_other_times_are_no_difference_and_everything_else_is(folder):
    before = compare.marks(folder)
    manifest = folder / "outputs" / "images" / "k" / "manifest.json"
    changed(manifest, "1.5", "2.5")
    changed(folder / "outputs" / "images" / "k" / "batches" / "00000.json", "2}", "3}")
    assert compare.differences(compare.marks(folder), before) == []
    digest = json.loads(manifest.read_text())["files"]["a.png"]["sha256"]
    changed(manifest, digest, digest[::-1])
    (folder / "outputs" / "results" / "main.md").write_text("| 1.6 |")
    (folder / "outputs" / "results" / ".main.md.writing").write_text("")
    (folder / "outputs" / "images" / "k" / "b.png").unlink()
    assert compare.differences(compare.marks(folder), before) == [
        "outputs/images/k/b.png is missing",
        "outputs/images/k/manifest.json differs",
        "outputs/results/.main.md.writing is left over",
        "outputs/results/main.md differs",
    ]


def test_finished_files_and_pieces_that_are_written_again_are_found(folder):
    kept = compare.finished_files(folder)
    piece = "outputs/quantised/q/group.safetensors"
    assert {IMAGE, piece} <= kept.keys()
    (folder / "outputs" / "quantised" / "q.partial").rename(folder / "outputs/quantised/q")
    assert compare.made_again(folder, kept) == []
    for name in (IMAGE, piece):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    assert len(compare.made_again(folder, kept)) == 2


def trial_in(folder: Path, text: str = "", code: int = 0) -> Trial:
    trial = Trial("damaged", 0, random.Random(0), folder)
    trial.ended.append(Ended("loraq run", code, text, 0.0, 0))
    return trial


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_file_must_be_named_or_made_again(folder, how, monkeypatch):
    expected = compare.marks(folder)
    good = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    files = sorted(folder.glob("outputs/images/k/*.png"))
    monkeypatch.setattr("tests.faults.damaged.HOW", (how,))
    paths, _ = damage_one(random.Random(1), files)
    names = [path.relative_to(folder).as_posix() for path in paths]
    damaged = compare.identity(folder, names)

    def failures(text: str = "", code: int = 0) -> list[str]:
        trial = trial_in(folder, text, code)
        judge(trial, expected, names, damaged)
        return trial.failures

    assert any("neither noticed nor made again" in line for line in failures())
    assert failures("nothing to say", 2)
    assert failures(f"'{names[0]}' is damaged", 2) == []
    (folder / "outputs" / "results" / "main.md").write_text("| 1.6 |")
    assert failures(f"'{names[0]}' is damaged", 2) == ["outputs/results/main.md differs"]
    for path, data in good.items():
        path.unlink(missing_ok=True)
        path.write_bytes(data)
    assert failures() == []


def write_three_files() -> None:
    for number in range(3):
        Path(f"outputs/{number}").write_text("x")


def test_a_command_is_killed_at_a_change_of_a_file_and_limited(tmp_path):
    (tmp_path / "outputs").mkdir()
    assert run(write_three_files, tmp_path).events >= 3
    shutil.rmtree(tmp_path / "outputs")
    (tmp_path / "outputs").mkdir()
    killed = run(write_three_files, tmp_path, Fault(signal.SIGKILL, event=2))
    assert killed.code == -signal.SIGKILL and len(list((tmp_path / "outputs").iterdir())) == 1
    stopped = run(write_three_files, tmp_path, Fault(file_size=0))
    assert stopped.code != 0
    running = Running(["--version"], tmp_path)
    ended = running.wait()
    assert ended.code == 0 and ended.text.startswith("loraq ")


def leave_a_temporary_folder() -> None:
    own = tempfile.TemporaryDirectory(prefix="own-")
    Path("outputs").write_text(own.name)
    weakref.finalize(leave_a_temporary_folder, own.cleanup)  # holds it until the process ends


def test_a_command_removes_its_own_temporary_folders_and_leaves_those_of_the_tests(tmp_path):
    with tempfile.TemporaryDirectory() as kept:
        assert run(leave_a_temporary_folder, tmp_path).code == 0
        assert Path(kept).is_dir()
    assert not Path((tmp_path / "outputs").read_text()).exists()
