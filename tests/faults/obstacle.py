"""A full or read-only disk, a limit of file sizes, a file in the way, a vanishing folder.

The command must end with an error in words and leave nothing half-written; once the obstacle is
gone, the same command must end well.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.faults import compare
from tests.faults.bench import Bench, Template, Trial
from tests.faults.commands import WORKS, filled
from tests.faults.processes import Ended, Fault, Program, Running

WRITING = ("rtn", "rtn", "svdquant", "gptq", "allocated", "quantize", "generate", "sweep", "report")
WRITING += ("tables", "images", "pipeline")


def try_obstacle(bench: Bench, trial: Trial) -> None:
    """Run a command against one obstacle, remove the obstacle, and run it again."""
    chance = trial.random
    work = chance.choice(WRITING)
    template = bench.template(work)
    start = bench.template(*WORKS[work].after) if WORKS[work].after else None
    trial.folder = bench.folder(trial.folder.name, start)
    program = filled(WORKS[work].program, trial.folder)
    possible = [o for o in OBSTACLES if o != "vanishing folder" or start is None]
    if os.geteuid():  # only root mounts disks
        possible = [name for name in possible if not name.endswith("disk")]
    trial.where = chance.choice(possible)
    trial.what = work
    gone = OBSTACLES[trial.where](trial, program, template) or "nothing"
    if trial.failures:
        return
    trial.expect_success(trial.run(program))
    if not trial.failures:
        trial.expect(compare.without(template.marks, gone, trial.folder))


def _expect_refusal(trial: Trial, ended: Ended, template: Template, may_succeed: bool) -> None:
    """The command ended in words, and left no temporary file and no wrong one."""
    trial.expect_words(ended)
    if ended.code == 0 and not may_succeed:
        trial.fail("succeeds in spite of the obstacle")
    if ended.code < 0:
        trial.fail(f"ends by signal {-ended.code}")
    found = compare.marks(trial.folder)
    trial.fail(*compare.wrong_numbers(found, template.marks, aside=False))
    trial.fail(*(f"{n} is left over" for n in found if n.endswith(".writing")))


def _full_disk(trial: Trial, program: Program, template: Template) -> None:
    output = trial.folder / "outputs"
    needed = sum(p.stat().st_size for p in (template.folder / "outputs").rglob("*") if p.is_file())
    with _mounted(trial, output, int(needed * trial.random.uniform(0.05, 1.1))) as full:
        ended = trial.run(program)
        _expect_refusal(trial, ended, template, may_succeed=True)
        if ended.code:
            trial.fail(*([] if _names_the_disk(ended.text) else ["does not name the full disk"]))
        full.grow()


def _names_the_disk(text: str) -> bool:
    return any(word in text for word in ("Disk full", "No space left", "disk is full"))


def _read_only(trial: Trial, program: Program, template: Template) -> None:
    with _mounted(trial, trial.folder / "outputs", 1 << 26) as disk:
        if trial.random.random() < 0.5:
            disk.remount("ro")
            ended = trial.run(program)
        else:
            moment = trial.random.random() * template.seconds
            trial.what += f", read-only after {moment:.1f} s"
            running = Running(program, trial.folder)
            time.sleep(moment)
            disk.remount("ro")
            ended = running.wait()
            trial.ended.append(ended)
        _expect_refusal(trial, ended, template, may_succeed=True)
        disk.remount("rw")


class _mounted:
    """A small disk in memory at `folder`; its contents stay when the block ends."""

    def __init__(self, trial: Trial, folder: Path, size: int) -> None:
        self.folder, self.trial = folder, trial
        self.kept = folder.with_name("before")
        folder.mkdir(exist_ok=True)
        folder.rename(self.kept)
        folder.mkdir()
        size += sum(4096 + path.stat().st_size for path in self.kept.rglob("*"))
        trial.what += f", disk of {size} bytes"
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "faults", folder], check=True)
        shutil.copytree(self.kept, folder, dirs_exist_ok=True)

    def __enter__(self) -> _mounted:
        return self

    def remount(self, option: str) -> None:
        """Change an option of the disk; waits until no file is being written."""
        for _ in range(200):
            if not subprocess.run(
                ["mount", "-o", f"remount,{option}", self.folder], capture_output=True
            ).returncode:
                return
            time.sleep(0.005)

    def grow(self) -> None:
        """Make space on the disk."""
        self.remount("size=64m")

    def __exit__(self, *failure: object) -> None:
        shutil.rmtree(self.kept)
        self.remount("rw")
        shutil.copytree(self.folder, self.kept)
        subprocess.run(["umount", self.folder], check=True)
        self.folder.rmdir()
        self.kept.rename(self.folder)


def _limit(trial: Trial, program: Program, template: Template) -> None:
    size = int(2 ** trial.random.uniform(12, 18))
    trial.what += f", files of at most {size} bytes"
    _expect_refusal(trial, trial.run(program, fault=Fault(file_size=size)), template, True)


def _file_in_the_way(trial: Trial, program: Program, template: Template) -> None:
    new = [n for n in template.marks if n not in compare.marks(trial.folder)]
    folders = sorted({str(p) for n in new for p in Path(n).parents if p.name})
    folders = [name for name in folders if not (trial.folder / name).exists()]
    if not folders:
        trial.what += ", no new folder"
        return
    way = trial.folder / trial.random.choice(folders)
    if way.parent.parent.name == "outputs" and trial.random.random() < 0.5:
        way = way.with_name(f"{way.name}.partial")
    way.parent.mkdir(parents=True, exist_ok=True)
    way.write_text("in the way")
    trial.what += f", a file {way.relative_to(trial.folder)}"
    ended = trial.run(program)
    trial.expect_words(ended)
    if ended.code < 0:
        trial.fail(f"ends by signal {-ended.code}")
    if ended.code and way.name not in ended.text:
        trial.fail(f"the error does not name {way.name}")
    if way.is_file():
        way.unlink()


def _folder_in_the_way(trial: Trial, program: Program, template: Template) -> None:
    new = sorted(n for n in template.marks if n not in compare.marks(trial.folder))
    new = [n for n in new if "/results/" in n or "/" not in n] or new
    way = trial.folder / trial.random.choice(new)
    (way / "inside").mkdir(parents=True)
    trial.what += f", a folder {way.relative_to(trial.folder)}"
    ended = trial.run(program)
    trial.expect_words(ended)
    if ended.code < 0:
        trial.fail(f"ends by signal {-ended.code}")
    if ended.code and way.name not in ended.text and way.parent.name not in ended.text:
        trial.fail(f"the error does not name {way.name}")
    if way.is_dir():
        shutil.rmtree(way)


def _vanishing(trial: Trial, program: Program, template: Template) -> str:
    """Returns the folder: what nothing needs any more is not made again."""
    moment = trial.random.random() * template.seconds
    running, gone = Running(program, trial.folder), trial.folder
    time.sleep(moment)
    folders = [
        p for p in [trial.folder / "outputs", *trial.folder.glob("outputs/**")] if p.is_dir()
    ]
    if folders:
        gone = trial.random.choice(sorted(folders))
        trial.what += f", {gone.relative_to(trial.folder)} vanishes after {moment:.1f} s"
        shutil.rmtree(gone, ignore_errors=True)
    ended = running.wait()
    trial.ended.append(ended)
    trial.expect_words(ended)
    if ended.code < 0:
        trial.fail(f"ends by signal {-ended.code}")
    return gone.relative_to(trial.folder).as_posix()


OBSTACLES: dict[str, Callable[[Trial, Program, Template], str | None]] = {
    "full disk": _full_disk,
    "read-only disk": _read_only,
    "limit of file sizes": _limit,
    "file in the way": _file_in_the_way,
    "folder in the way": _folder_in_the_way,
    "vanishing folder": _vanishing,
}
