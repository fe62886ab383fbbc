"""Load a user's branch finder from a .py file. Cache keys contain the file's hash, not its path.

Keys and records hold the file's name and the hash of its text, so that an edited file makes new
products. Modules that the file imports are not part of the hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from loraq.errors import LoraqError, near_matches

ENDING = ".py"


def is_own_file(name: str) -> bool:
    """Whether a setting's value is the path of a file rather than the name of a module of ours."""
    return name.endswith(ENDING)


def label(path: str) -> str:
    """NAME.py@HASH: the file's name and 16 hex digits of its sha256."""
    return f"{Path(path).name}@{hashlib.sha256(_read(path)).hexdigest()[:16]}"


def load(path: str, function: str) -> ModuleType:
    """The file as a module, once for each contents; LoraqError where it lacks `function`."""
    name = "loraq_own_file_" + label(path).split("@")[1]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, Path(path).expanduser())
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # as `import` does it: dataclasses look their module up there
        try:
            spec.loader.exec_module(module)
        except BaseException as error:
            del sys.modules[name]
            if not isinstance(error, Exception):
                raise
            raise LoraqError(
                f"'{path}' cannot be imported: {type(error).__name__}: {error}. Fix the file: "
                "it must run without errors when it is imported."
            ) from error
    module = sys.modules[name]
    if not callable(getattr(module, function, None)):
        raise LoraqError(
            f"'{path}' has no function '{function}'. Define it as the library's own modules do "
            "(CONTRIBUTING.md, notebooks/3_your_own_method.ipynb)."
        )
    return module


def _read(path: str) -> bytes:
    file = Path(path).expanduser()
    try:
        return file.read_bytes()
    except OSError as error:
        beside = [entry.name for entry in file.parent.glob("*.py")] if file.parent.is_dir() else []
        close = near_matches(file.name, beside)
        raise LoraqError(
            f"'{path}' cannot be read ({error.strerror})."
            + (f" Beside it: {', '.join(close)}." if close else "")
            + f" Give the path of a {ENDING} file, from the folder that the command is given in."
        ) from None
