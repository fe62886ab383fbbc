"""Code and commands in processes of their own, forked from one that has imported what they import.

A new interpreter takes ten seconds of CPU to import torch, diffusers and transformers. The process
that is forked is started at first use, once in each process of the tests; it has loaded no model.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

COMMAND = "import sys; from loraq.cli import main; main(sys.argv[1:])"
"""The command `loraq`."""
_IMPORTED = (
    "pytest",
    "loraq.cli",
    "loraq.diffusers_quantizer",
    "loraq.runner.experiment",
    "loraq.runner.sweep",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma",
    "tests.forked",
)


def start(
    code: str,
    *arguments: object,
    output: Path | str = os.devnull,
    errors: Path | str | None = None,
    **environment: str,
) -> ForkServerProcess:
    """Start `python -c CODE ARGUMENTS`; join it, and read its `exitcode`.

    output, errors: the files of its output and its messages (None: one file). environment: more
    variables.
    """
    given = [str(argument) for argument in arguments]
    files = (str(output), str(errors or output))
    process = _context().Process(target=_execute, args=(code, given, files, environment))
    process.start()
    return process


class Popen:
    """What `subprocess.Popen` gives of the command `python -m loraq.cli …`, forked instead.

    For benchmarks, which start commands and measure or kill them. `stdout` is its output with its
    messages.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._folder = TemporaryDirectory()
        pipe = Path(self._folder.name) / "output"
        os.mkfifo(pipe)
        self._process = start(COMMAND, *command[3:], output=pipe)
        self.stdout: BinaryIO = open(pipe, "rb")  # noqa: SIM115  waits for the other end
        self.pid = self._process.pid

    def __enter__(self) -> Popen:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()
        self.stdout.close()
        self._folder.cleanup()

    def poll(self) -> int | None:
        return self._process.exitcode

    @property
    def returncode(self) -> int | None:
        return self.poll()


@cache
def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    return context


def _execute(
    code: str, arguments: list[str], files: tuple[str, str], environment: dict[str, str]
) -> None:
    for number, name in enumerate(files, 1):
        with open(name, "ab", buffering=0) as stream:
            os.dup2(stream.fileno(), number)
    os.environ.update(environment)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
