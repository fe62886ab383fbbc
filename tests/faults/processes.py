"""Commands in processes of their own that start at once: forked after everything was imported.

A child runs the module `loraq` as `python -m loraq` does, with its own signals, output and limits.
Starting an interpreter and importing torch takes longer than a whole command on a small pipeline.
"""

from __future__ import annotations

import atexit
import os
import resource
import runpy
import signal
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

WRITING = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}
"""Audit events that change files; `open` counts if it writes."""
PATIENCE = 300.0
"""Seconds after which a command counts as hanging."""
LOG, EVENTS = "log", "events"
Program = Sequence[str] | Callable[[], None]
"""Arguments of `python -m loraq`, or a user's own program."""


@dataclass(frozen=True)
class Fault:
    """Something that happens in the process itself.

    At its `event`-th change of a file it sends itself `signal`. `file_size`: the largest file that
    it may write, in bytes (as a quota).
    """

    signal: int = 0
    event: int = 0
    file_size: int | None = None


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative: a signal), its output, and its file changes."""

    command: str
    code: int
    text: str
    seconds: float
    events: int
    hung: bool = False

    @property
    def words(self) -> str:
        """The command, its status and the end of its output."""
        return f"$ {self.command}\n[{self.code}{', HUNG' * self.hung}] {self.text[-1500:].strip()}"


class Running:
    """A command that was started in `folder`."""

    def __init__(self, program: Program, folder: Path, fault: Fault | None = None) -> None:
        self.folder, self.program = folder, program
        self.started = time.monotonic()
        (folder / LOG).mkdir(exist_ok=True)
        self.log = folder / LOG / f"{len(list((folder / LOG).iterdir())):03d}"
        self.log.touch()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _child(program, folder, self.log, fault or Fault())

    def send(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            os.kill(self.pid, number)

    def wait(self) -> Ended:
        """Wait until the command has ended; it is killed if it hangs."""
        hung = False
        while os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if time.monotonic() - self.started > PATIENCE:
                hung = True
                os.kill(self.pid, signal.SIGKILL)
            time.sleep(0.005)
        _, status = os.waitpid(self.pid, 0)
        count = self.log.with_suffix(f".{EVENTS}")
        return Ended(
            describe(self.program),
            os.waitstatus_to_exitcode(status),
            self.log.read_text(errors="replace"),
            time.monotonic() - self.started,
            int(count.read_text()) if count.is_file() else 0,
            hung,
        )


def run(program: Program, folder: Path, fault: Fault | None = None) -> Ended:
    """Run a command in `folder` to its end."""
    return Running(program, folder, fault).wait()


def describe(program: Program) -> str:
    """A program as a line of a shell."""
    if callable(program):
        return f"{program.__module__}.{program.__name__}"
    return " ".join(["loraq", *program])


def _child(program: Program, folder: Path, log: Path, fault: Fault) -> None:
    """Run the program and leave the process; never returns."""
    code = 1
    for finalizer in [*weakref.finalize._registry]:  # temporary folders are the parent's to remove
        finalizer.atexit = False
    try:
        output = os.open(log, os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until the command begins
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        for name in ("TMPDIR", "XDG_CACHE_HOME"):
            os.environ[name] = str(folder / name.lower())
            (folder / name.lower()).mkdir(exist_ok=True)
        tempfile.tempdir = None
        if fault.file_size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault.file_size, resource.RLIM_INFINITY))
        counted = _count_events(folder, fault)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        if callable(program):
            program()
        else:
            sys.argv = ["loraq", *program]
            runpy.run_module("loraq", run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
            log.with_suffix(f".{EVENTS}").write_text(str(counted()))
        finally:
            os._exit(code)


def _count_events(folder: Path, fault: Fault) -> Callable[[], int]:
    """Count changes of files under `folder` from now on; at the fault's event, send its signal."""
    count = 0
    inside = str(folder)

    def hook(name: str, arguments: tuple) -> None:
        nonlocal count
        if name == "open":
            if not isinstance(arguments[2], int) or not arguments[2] & (os.O_WRONLY | os.O_RDWR):
                return
        elif name not in WRITING:
            return
        path = os.fspath(arguments[0]) if isinstance(arguments[0], (str, os.PathLike)) else ""
        if isinstance(path, bytes) or (path.startswith("/") and not path.startswith(inside)):
            return
        count += 1
        if count == fault.event:
            os.kill(os.getpid(), fault.signal)

    sys.addaudithook(hook)
    return lambda: count
