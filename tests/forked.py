"""Code and commands in processes of their own, forked from one that has imported what they import.

A new interpreter takes ten seconds of CPU to import torch, diffusers and transformers. The process
that is forked is started at first use, once in each process of the tests; it has loaded no model.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

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
