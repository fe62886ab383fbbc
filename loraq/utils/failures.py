"""How a command ends: errors in words, tracebacks in a file, interruptions in one line.

With the environment variable LORAQ_DEBUG=1, tracebacks are shown on the terminal instead.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import platform
import select
import shlex
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from loraq import __version__
from loraq.errors import LoraqError
from loraq.utils.console import LOGGER, show_messages
from loraq.utils.disk_errors import disk_error

DEBUG = "LORAQ_DEBUG"


@contextlib.contextmanager
def reporting_errors() -> Iterator[None]:
    """End a command in words: exit status 2 for a LoraqError, 1 for a fault, 130 for Ctrl-C.

    A reader of the output that has gone (`loraq … | head`) ends it in silence, with 141.
    """
    show_messages()
    try:
        yield
        sys.stdout.flush()
    except LoraqError as error:
        _show_if_asked()
        LOGGER.error("%s", error)
        raise SystemExit(2) from None
    except KeyboardInterrupt as stop:
        _show_if_asked()
        where = "".join(f" {note}" for note in getattr(stop, "__notes__", ()))
        LOGGER.error(
            "interrupted%s. Finished work is kept; run the same command again to resume.", where
        )
        raise SystemExit(130) from None
    except OSError as error:
        if isinstance(error, BrokenPipeError) and (_unread(sys.stdout) or _unread(sys.stderr)):
            _discard_output()
            raise SystemExit(141) from None
        missing = error.filename is None or error.errno == errno.ENOENT
        told = error if missing else disk_error(error, Path(os.fsdecode(error.filename)))
        if not isinstance(told, LoraqError):
            report_fault(error)
            raise SystemExit(1) from None
        _show_if_asked()
        LOGGER.error("%s", told)
        raise SystemExit(2) from None
    except Exception as error:
        report_fault(error)
        raise SystemExit(1) from None
    finally:
        atexit.register(_ignore_interruptions)  # at the end, to run before torch's own functions


def _ignore_interruptions() -> None:
    """Ctrl-C has nothing to stop while the interpreter ends; torch would print a traceback."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)


def report_fault(error: BaseException, during: str = "") -> None:
    """Log in three lines that the program failed, and write the traceback to a file.

    during: what failed, such as "row 'rtn'".
    """
    words = str(error).strip().splitlines() or [""]
    LOGGER.error(
        "%sinternal error: %s: %.300s\n"
        '  This is a fault of LoRaQ. Please report it: CONTRIBUTING.md, "Reporting a fault".\n'
        "  %s",
        f"{during} failed with an " if during else "",
        type(error).__name__,
        words[0],
        _traceback_place(error),
    )
    _show_if_asked()


def _traceback_place(error: BaseException) -> str:
    """Write the command, versions and traceback to a file; the sentence that names it."""
    packages = ("torch", "diffusers", "transformers", "hydra")
    versions = [f"loraq {__version__}", f"python {platform.python_version()}", platform.platform()]
    loaded = [(name, sys.modules[name]) for name in packages if name in sys.modules]
    versions += [f"{name} {getattr(module, '__version__', '?')}" for name, module in loaded]
    text = "".join(traceback.format_exception(error))
    try:
        number, path = tempfile.mkstemp(prefix="loraq-fault-", suffix=".log")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{shlex.join(sys.argv)}\n{', '.join(versions)}\n\n{text}")
    except OSError as reason:
        return f"The traceback cannot be saved ({reason.strerror}); {DEBUG}=1 shows it."
    return f"Traceback: {path} ({DEBUG}=1 shows it here)"


def _show_if_asked() -> None:
    """Print the traceback of the exception that is being handled, if LORAQ_DEBUG is set."""
    if os.environ.get(DEBUG, "0") not in ("", "0"):
        traceback.print_exc()


def _unread(stream: TextIO) -> bool:
    """Whether the reader of this stream has closed it."""
    try:
        watch = select.poll()
        watch.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in watch.poll(0))
    except (OSError, ValueError):
        return False


def _discard_output() -> None:
    """Nobody reads the output: Python must not try again to write it when it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        if _unread(stream):
            os.dup2(nowhere, stream.fileno())
