"""Files are complete or absent, for any number of processes, and whatever the system refuses."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from loraq.errors import DiskFullError, LoraqError
from loraq.utils.assets import PACKAGE
from loraq.utils.files import (
    ABANDONED,
    TEMPORARY,
    check_room,
    folder_bytes,
    remove_temporaries,
    replacing,
    write_bytes,
    write_text,
)

WRITE_OFTEN = """
import sys
from pathlib import Path
from loraq.utils.files import write_bytes
sys.stdin.readline()
for _ in range(60):
    write_bytes(Path(sys.argv[1]), sys.argv[2].encode() * 20_000)
"""


def test_processes_that_write_the_same_file_at_once_all_end_well(tmp_path):
    path = tmp_path / "main.md"
    write_bytes(path, b"0" * 20_000)
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITE_OFTEN, str(path), str(number)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for number in range(3)
    ]
    for writer in writers:
        writer.stdin.write(b"\n")
        writer.stdin.flush()
    while any(writer.poll() is None for writer in writers):
        read = path.read_bytes()
        assert len(read) == 20_000 and len(set(read)) == 1
    assert [(writer.wait(), writer.stderr.read()) for writer in writers] == [(0, b"")] * 3
    assert os.listdir(tmp_path) == ["main.md"]


def test_only_temporary_files_that_nobody_writes_are_abandoned(tmp_path):
    old, new = tmp_path / f".a{TEMPORARY}", tmp_path / "inner" / f".b{TEMPORARY}"
    new.parent.mkdir()
    of_safetensors = tmp_path / "inner" / ".tmpaB3dE6"
    for path in (old, new, of_safetensors):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    remove_temporaries(tmp_path, ABANDONED)
    assert new.is_file() and of_safetensors.is_file() and not old.exists()
    remove_temporaries(tmp_path)
    assert list(new.parent.iterdir()) == []


def test_whoever_may_read_other_files_may_read_safetensors(tmp_path):
    """safetensors makes files that only their owner reads, in folders that users share."""
    (tmp_path / "plain").write_bytes(b"")
    with replacing(tmp_path / "a") as temporary:
        save_file({"a": numpy.zeros(3)}, temporary)
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_the_size_of_a_folder_is_read_while_files_come_and_go(tmp_path):
    (tmp_path / "stays").write_bytes(b"12345")
    stop = threading.Event()

    def change() -> None:
        while not stop.is_set():
            write_bytes(tmp_path / "goes", b"")
            (tmp_path / "goes").unlink()

    thread = threading.Thread(target=change)
    thread.start()
    try:
        assert {folder_bytes(tmp_path) for _ in range(500)} == {5}
    finally:
        stop.set()
        thread.join()


def obstacles(folder: Path) -> dict[str, tuple[Path, str]]:
    """Kind → path that cannot be written, and the words of its error."""
    (folder / "file").write_text("")
    (folder / "folder").mkdir()
    (folder / "loop").symlink_to("loop")
    (folder / "nowhere").symlink_to("missing/folder")
    os.mkfifo(folder / "pipe")
    return {
        "file for a folder": (folder / "file" / "in" / "a", r"'\S+/file': it is a file, not a fol"),
        "folder for a file": (folder / "folder", r"/folder': it is a folder.*path of a file"),
        "long name": (folder / ("x" * 256), r"too long \(256 bytes.*255.*shorter"),
        "long path": (folder / "/".join(["x" * 200] * 25), r"too long \(200 bytes.*4096.*shorter"),
        "loop": (folder / "loop" / "a", r"/loop': its symbolic links form a loop.*output="),
        "link to nothing": (folder / "nowhere" / "a", r"/nowhere': it does not exist.*leads nowhe"),
        "pipe": (folder / "pipe", r"pipe' is a device or a pipe"),
        "device": (Path("/dev/full"), r"/dev/full' is a device or a pipe"),
    }


KINDS = [
    "file for a folder",
    "folder for a file",
    "long name",
    "long path",
    "loop",
    "link to nothing",
]


@pytest.mark.parametrize("kind", [*KINDS, "pipe", "device"])
def test_what_the_system_refuses_is_told_with_path_and_remedy(tmp_path, kind):
    path, words = obstacles(tmp_path)[kind]
    with pytest.raises(LoraqError, match=words):
        write_text(path, "new")
    assert not list(tmp_path.rglob(f"*{TEMPORARY}"))


LIMITED = """
import os, resource, sys
from pathlib import Path
import numpy, safetensors.numpy
from loraq.errors import LoraqError
from loraq.utils.files import replacing, write_bytes
path = Path(sys.argv[1])
exec(sys.argv[2])
for write in (
    lambda temporary: temporary.write_bytes(bytes(9000)),
    lambda temporary: safetensors.numpy.save_file({"a": numpy.zeros(9000)}, temporary),
):
    try:
        with replacing(path) as temporary:
            write(temporary)
    except LoraqError as error:
        print(error)
"""


@pytest.mark.parametrize(
    ("limit", "words"),
    [
        ("resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))", "larger than the system"),
        (
            "resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))\n"
            "held = [os.dup(0) for _ in range(20 - 1 - os.dup(0))]",
            "too many files are open (this process may open 20). Raise the limit",
        ),
        ("os.getuid() or os.setuid(65534)", "no permission"),
    ],
)
def test_limits_of_the_process_are_told_by_every_writer(tmp_path, limit, words):
    """By Python's own writing and by that of safetensors, whose errors are of another type."""
    target = tmp_path / "closed" / "a"
    write_bytes(target, b"old")
    if "setuid" in limit:
        target.parent.chmod(0o555)
        for parent in (target.parent.parent, *target.parent.parent.parents):
            if parent.stat().st_uid == os.getuid() and parent.parent != parent:
                parent.chmod(parent.stat().st_mode | 0o111)
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(target), limit], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert len(said) == 2 and all(words in line and f"{target}'" in line for line in said)
    assert target.read_bytes() == b"old" and os.listdir(target.parent) == ["a"]


def test_a_full_disk_is_told_by_every_writer(small_disk):
    path = small_disk / "a"
    write_bytes(path, b"old")
    with pytest.raises(DiskFullError, match=r"Disk full while writing '\S+/a' .*Free some"):
        write_bytes(path, bytes(100_000))
    with pytest.raises(DiskFullError, match="Free some"), replacing(path) as temporary:
        save_file({"a": numpy.zeros(100_000)}, temporary)
    with pytest.raises(DiskFullError):
        check_room(small_disk, 100_000)
    check_room(small_disk, 1000)
    assert path.read_bytes() == b"old" and os.listdir(small_disk) == ["a"]


WRITERS = {
    "open",
    "print_png",
    "save",
    "save_file",
    "savefig",
    "to_csv",
    "write_bytes",
    "write_text",
}
ELSEWHERE = {
    "utils/files.py",  # the one place
    "utils/output_folder.py",  # the probe of a folder
    "data/download.py",  # parts of a download that resume
    "quantization/calibration.py",  # memory that is mapped to a file
    "utils/failures.py",  # a traceback, into a new file of the system
}


def test_no_module_writes_files_by_itself():
    """Writers get the path that `replacing` yields, or a stream in memory."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {ast.unparse(node)}"
        for path in PACKAGE.rglob("*.py")
        if str(path.relative_to(PACKAGE)) not in ELSEWHERE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and _writes(node)
    ]
    assert found == []


def _writes(call: ast.Call) -> bool:
    method = isinstance(call.func, ast.Attribute)
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if name not in WRITERS or ast.unparse(call.func) == "session.save":  # W&B copies a file
        return False
    given = [ast.unparse(part) for part in (*call.args, *(word.value for word in call.keywords))]
    if name == "open":
        return any(part[:2] in ("'w", "'x", "'a") or part == "'r+b'" for part in given)
    return (method or name == "save_file") and not {"temporary", "stream"} & set(given)
