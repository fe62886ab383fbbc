"""Load a branch finder from a user's .py file.

Keys and records hold the file's name and the hash of its text, not its path, so that an edited file
makes new products. The hash does not cover modules that the file imports.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from loraq.errors import LoraqError, near_matches
from loraq.utils.assets import PACKAGE

ENDING = ".py"


@functools.cache
def modules_defining(package: str, function: str) -> tuple[str, ...]:
    """Modules of `loraq/PACKAGE/` that define `function`; their text is read, nothing imported."""
    defines = re.compile(rf"^def {function}\(", re.MULTILINE)
    files = sorted(path for path in (PACKAGE / package).glob("*.py") if path.stem[0] != "_")
    return tuple(f.stem for f in files if defines.search(f.read_text(encoding="utf-8")))


def is_user_file(name: str) -> bool:
    """Whether a setting is the path of a Python file rather than the name of a module."""
    return name.endswith(ENDING)


def user_file_label(path: str) -> str:
    """NAME.py@HASH: the file's name and 16 hex digits of its sha256."""
    return f"{Path(path).name}@{hashlib.sha256(_read(path)).hexdigest()[:16]}"


def load_user_module(path: str, function: str) -> ModuleType:
    """Import the file, once per contents; LoraqError if it does not define `function`."""
    name = "loraq_user_file_" + user_file_label(path).split("@")[1]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(path).expanduser())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as `import` does: dataclasses look up their module there
        try:
            with running(path, "its import"):
                spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    module = sys.modules[name]
    if not callable(getattr(module, function, None)):
        raise LoraqError(
            f"'{path}' has no function '{function}'. Define it as the library's modules do "
            "(CONTRIBUTING.md, notebooks/3_your_own_method.ipynb)."
        )
    return module


@contextlib.contextmanager
def running(path: str, what: str) -> Iterator[None]:
    """Whatever a user's code raises is a LoraqError that names its file and line.

    `sys.exit()` too, which would end the whole run as if it had succeeded. Ctrl-C stays Ctrl-C; a
    note says what was running. path: the file, or the name of a module of the library, whose own
    exceptions are left as they are. what: what runs, for the error.
    """
    try:
        yield
    except LoraqError:
        raise
    except KeyboardInterrupt as stop:
        stop.add_note(f"while '{path}' was running ({what})")
        raise
    except BaseException as error:
        if isinstance(error, Exception) and not is_user_file(path):
            raise
        name = Path(path).name
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).name == name]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
        raise LoraqError(
            f"'{path}': {what} raised {type(error).__name__}: {error}"
            + (f" (line {line})" if line else "")
            + ". Fix the file; LORAQ_DEBUG=1 shows the traceback."
        ) from error


def _read(path: str) -> bytes:
    file = Path(path).expanduser()
    try:
        return file.read_bytes()
    except OSError as error:
        siblings = (
            [entry.name for entry in file.parent.glob("*.py")] if file.parent.is_dir() else []
        )
        close = near_matches(file.name, siblings)
        raise LoraqError(
            f"'{path}' cannot be read ({error.strerror})."
            + (f" Similar names: {', '.join(close)}." if close else "")
            + f" Give the path of a {ENDING} file, relative to the current folder."
        ) from None
