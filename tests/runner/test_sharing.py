"""Equal and overlapping commands at the same time all end well; they share what they make."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from loraq.compose import load_rows
from loraq.config import GenerateConfig
from loraq.data import Prompt
from loraq.quantization.quantizer import quantize_model
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
from tests.forked import start
from tests.quantization.test_quantize import RTN
from tests.quantization.toy import Toy, toy_layers

WORKER = """
import os, sys, time
from pathlib import Path
import loraq.quantization.group_work as groups
import loraq.runner.embeddings as text
import loraq.runner.generate as images
from loraq.run import run

log = Path(sys.argv[1])

def wait_for_the_other(kind):
    (log / f"{kind}.{os.getpid()}").touch()
    for _ in range(2400):
        if len(list(log.glob(f"{kind}.*"))) == 2:
            return
        time.sleep(0.05)
    sys.exit(f"the other process makes no {kind}")

def noted(module, name, kind, names):
    made, made_here = getattr(module, name), []
    def make(*given, **more):
        if more.get("output_type") != "latent":
            with open(log / kind, "a") as stream:
                stream.write(names(*given) + "\\n")
            if not made_here:
                wait_for_the_other(kind)
            made_here.append(kind)
        return made(*given, **more)
    setattr(module, name, make)

def batch(pipe, model, prompts, *_):
    return " ".join(p.name for p in prompts)

noted(images, "image_batch", "images", batch)
noted(text, "encode_prompts", "embeddings", batch)
noted(groups, "quantize_group", "quantised", lambda group, *_: group.name)
print(run(sys.argv[2:], progress=False).text)
"""


KINDS = ("images", "embeddings", "quantised")


def made_in(output: Path) -> dict[str, bytes]:
    """All images, packed layers and embeddings."""
    paths = [*output.glob("images/*/*.png"), *output.glob("*[ds]/*/*.safetensors")]
    return {str(path.relative_to(output)): path.read_bytes() for path in paths}


def test_two_processes_share_and_make_every_part_once(overrides, tmp_path):
    """The same command with RANK 0 and 1, as torchrun starts it.

    Neither goes on with its first part of a kind before the other makes one, too.
    """
    alone, shared, log = tmp_path / "alone", tmp_path / "shared", tmp_path / "log"
    settings = ["method=rtn", *overrides[:-1], "data.count=8", "generate.batch_size=1"]
    run([*settings, f"output={alone}"], progress=False)
    log.mkdir()
    settings.append(f"output={shared}")
    files = [{"output": tmp_path / f"{n}.out", "errors": tmp_path / f"{n}.err"} for n in (0, 1)]
    workers = [start(WORKER, log, *settings, **files[n], RANK=str(n)) for n in (0, 1)]
    for worker in workers:
        worker.join()
    said = "".join(file["errors"].read_text() for file in files)
    assert [worker.exitcode for worker in workers] == [0, 0], said
    printed = [file["output"].read_text() for file in files]
    assert "psnr" in printed[0].lower() and not printed[1].strip()
    made = made_in(shared)
    assert made == made_in(alone)
    batches, text, groups = ((log / kind).read_text().split() for kind in KINDS)
    assert len(batches) == 2 * 8 and {batches.count(name) for name in batches} == {2}
    assert len(text) == len(set(text)) == 8
    files = sorted(Path(path).stem for path in made if path.startswith("quantised/"))
    assert sorted(groups) == files and len(files) > 2
    assert not list(shared.glob("*/*.*.lock"))


DIES = """
import os, sys, time
from pathlib import Path
import loraq.quantization.group_work as groups
from loraq.quantization.group_file import group_files
from loraq.quantization.quantizer import quantize_groups
from loraq.runner.store import Store
from tests.quantization.test_quantize import RTN
from tests.quantization.toy import Toy, toy_layers

root, dead, made, quantize_group = Path(sys.argv[1]), Path(sys.argv[2]), [], groups.quantize_group

def make(group, *given):
    made.append(group.name)
    if dies and len(made) == 2:
        dead.write_text(group.name)
        os._exit(9)
    while not dies and not dead.exists():
        time.sleep(0.01)
    return quantize_group(group, *given)

groups.quantize_group = make
dies, store, pieces = os.fork() > 0, Store(root), []
with store.share("quantised", "k", {}, pieces) as folder:
    def claim(part, wait):
        return store.locks.part("quantised", "k", part, wait)
    names = quantize_groups(Toy(), toy_layers(), RTN, folder, progress=None, claim=claim)
    pieces += group_files(names)
print(*made)
"""


def test_the_groups_of_a_process_that_dies_are_made_by_another(tmp_path):
    """One process dies in its second group, while the other makes its first."""
    alone, dead = tmp_path / "alone", tmp_path / "dead"
    quantize_model(Toy(), toy_layers(), RTN, None, alone, progress=None)
    printed = tmp_path / "printed"
    process = start(DIES, tmp_path, dead, output=printed, errors=os.devnull)
    process.join()
    deadline = time.monotonic() + 100
    while not (made := printed.read_text().split()):  # of the process that goes on
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert process.exitcode == 9 and dead.read_text() in made and len(made) == 3
    product = tmp_path / "quantised" / "k"
    found = {path.name: path.read_bytes() for path in product.glob("*.safetensors")}
    assert found == {path.name: path.read_bytes() for path in alone.glob("*.safetensors")}
    assert len(found) == 4 and not list(tmp_path.glob("*/*.lock"))


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
    printed = tmp_path / "printed"
    process = start(AT_ONCE, tmp_path, *settings, output=printed)
    process.join()
    assert process.exitcode == 0 and "Traceback" not in printed.read_text(), printed.read_text()
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
    model, settings = load_rows([])[0].model, GenerateConfig(batch_size=1)
    found = generation.generate_images(Pipe(), model, prompts, settings, partial, None)
    assert found == [image] and calls == [done_file, image, done_file] and not partial.exists()
