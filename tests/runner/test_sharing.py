"""Processes that need the same images share the batches; the images do not depend on it."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

from loraq.runner.experiment import run
from loraq.runner.locks import Locks
from loraq.runner.store import Store

WORKER = """
import sys, loraq.runner.generate as g
from loraq.run import run
made = g.image_batch
def counted(pipe, model, batch, *rest, **more):
    if more.get("output_type") != "latent":
        with open(sys.argv[1], "a") as log:
            log.write(" ".join(p.name for p in batch) + "\\n")
    return made(pipe, model, batch, *rest, **more)
g.image_batch = counted
print(run(sys.argv[2:], progress=False).text)
"""


def images(output: Path) -> dict[str, bytes]:
    return {str(p.relative_to(output)): p.read_bytes() for p in output.glob("images/*/*.png")}


def test_two_processes_make_every_batch_once(overrides, tmp_path):
    """The same command with RANK 0 and 1, as torchrun starts it."""
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    settings = ["method=rtn", *overrides[:-1], "data.count=8", "generate.batch_size=1"]
    run([*settings, f"output={alone}"], progress=False)
    log = tmp_path / "log"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(log), *settings, f"output={shared}"],
            env=os.environ | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    printed = [worker.communicate()[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert "psnr" in printed[0].lower() and not printed[1].strip()
    assert images(shared) == images(alone)
    batches = log.read_text().split()
    assert len(batches) == 2 * 8 and {batches.count(name) for name in batches} == {2}
    assert not list(shared.glob("images/*.*.lock"))


def test_a_lock_file_that_is_deleted_never_has_two_holders(tmp_path, monkeypatch):
    """The second process locks the file when the first releases it; the third comes after both."""
    (tmp_path / "images").mkdir()
    first, second, third = (Locks(tmp_path).part("images", "k", "0", False) for _ in range(3))
    held = [first.__enter__()]
    flock = fcntl.flock

    def release(handle: int, operation: int) -> None:
        flock(handle, operation)
        if operation == fcntl.LOCK_UN:
            monkeypatch.undo()
            held.append(second.__enter__())

    monkeypatch.setattr(fcntl, "flock", release)
    first.__exit__(None, None, None)
    held.append(third.__enter__())
    assert held == [True, True, False]
    second.__exit__(None, None, None)
    assert not list((tmp_path / "images").iterdir())


def test_the_claim_of_a_process_that_dies_is_released(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "images").mkdir()
    code = (
        "import os, sys; from loraq.runner.store import Store\n"
        "with Store(sys.argv[1]).locks.part('images', 'k', '00000', False) as mine:\n"
        "    print(mine, flush=True); sys.stdin.readline(); os._exit(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline().strip() == "True"
        with store.locks.part("images", "k", "00000", wait=False) as mine:
            assert not mine
        other.communicate("\n")
    with store.locks.part("images", "k", "00000", wait=True) as mine:
        assert mine
