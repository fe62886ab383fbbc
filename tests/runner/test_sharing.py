"""Equal and overlapping commands at the same time all end well; images are made once."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

from loraq.config import GenerateConfig
from loraq.data import Prompt
from loraq.results.experiment_folder import rewrite_tables
from loraq.runner import generate as generation
from loraq.runner import publish
from loraq.runner.experiment import run
from loraq.runner.locks import Locks
from loraq.runner.store import Store
from loraq.utils import pieces
from loraq.utils.files import TEMPORARY, write_bytes, write_json
from loraq.utils.hashing import file_hash
from loraq.utils.output_folder import folder_lock
from loraq.utils.pieces import write_piece

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


AT_ONCE = """
import os, sys, traceback
from pathlib import Path
import loraq.diffusers_quantizer
from loraq.cli import main
import loraq.results.report
from loraq.runner import experiment

def at_once(*commands):
    pids = []
    for command in commands:
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 0
        try:
            main(command)
        except SystemExit as stop:
            code = stop.code
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

output, settings = sys.argv[1], sys.argv[2:]
run = ["run", "--quiet", *settings, f"output={output}"]
assert at_once(run, run) == [0, 0]
name = next(Path(output).glob("results/*")).name
tables, report = ["tables", "--output", output], ["report", name, "--output", output]
assert at_once(run, run, tables, report, ["cache", "--output", output]) == [0] * 5
"""


def test_equal_and_overlapping_commands_at_once_all_end_well(overrides, tmp_path):
    """From nothing, and with everything finished."""
    settings = ["method=rtn", *overrides[:-1], "data.count=2"]
    command = [sys.executable, "-c", AT_ONCE, str(tmp_path), *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(list(tmp_path.glob("results/*/main.*"))) == 3
    assert not list(tmp_path.rglob(f"*{TEMPORARY}"))


def test_tables_pictures_and_rows_of_one_folder_are_written_by_one_process(overrides, monkeypatch):
    """Readers find every file while others replace it."""
    outcome = run(["method=rtn", *overrides], progress=False)
    write_json(outcome.folder / "rows.json", {})  # as from other rows: pictures are drawn again
    (outcome.folder / "old.png").write_bytes(b"")
    drawn = publish.image_grid

    def draw(*given, **more):
        assert (outcome.folder / "grid.png").is_file()
        return drawn(*given, **more)

    monkeypatch.setattr(publish, "image_grid", draw)
    with folder_lock(outcome.folder):
        again = threading.Thread(target=run, args=(["method=rtn", *overrides], False))
        again.start()
        again.join(1)
        assert again.is_alive() and (outcome.folder / "old.png").is_file()
    again.join()
    assert {path.name for path in outcome.folder.glob("*.png")} == {"grid.png", "layer_errors.png"}
    with folder_lock(outcome.folder):
        output = outcome.folder.parent.parent
        tables = threading.Thread(target=rewrite_tables, args=(output, []))
        tables.start()
        tables.join(0.3)
        assert tables.is_alive()
    tables.join()


def test_a_product_may_be_finished_while_its_images_are_compared(tmp_path, monkeypatch):
    prompts, partial = [Prompt("a", "a cat")], tmp_path / "k.partial"
    done_file, image = partial / generation.batch_file(0), partial / "a.png"
    write_piece(done_file, b"{}")
    write_piece(image, b"image")
    write_bytes(image, b"another")
    calls = []

    def finished_meanwhile(path: Path) -> str:
        calls.append(path)
        if len(calls) == 3:
            shutil.move(partial, tmp_path / "k")
        return file_hash(path)

    class Pipe:
        def set_progress_bar_config(self, **_) -> None: ...

    monkeypatch.setattr(pieces, "file_hash", finished_meanwhile)
    settings = GenerateConfig(batch_size=1)
    found = generation.generate_images(Pipe(), None, prompts, settings, partial, None)
    assert found == [image] and calls == [done_file, image, done_file] and not partial.exists()
