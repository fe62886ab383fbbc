"""What commands leave behind: listed, and compared with what undisturbed commands make.

A file's mark is the hash of its contents without what differs between equal runs: times, and the
checksums of files that contain times. Locks count as no files.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from loraq.utils.disk_errors import TEMPORARY
from loraq.utils.files import ABANDONED

OUTPUT = "outputs"
ROOTS = (OUTPUT, "saved", "groups", "scores.json", "pipeline.json", "tmpdir")
IGNORED = re.compile(r"(^|/)(sweeps|hydra)/|\.lock$|^tmpdir$|^xdg_cache_home$")
"""Sweeps have the time in their name."""
ASIDE = re.compile(r"\.corrupted(/|$)")
UNFINISHED = re.compile(r"\.writing$|\.partial(/|$)|(^|/)scratch/|^tmpdir/")
TIMES = {"seconds", "checksum", "finished", "created", "timings", "machine"}
TIMED = re.compile(r"\.seconds$|(^|/)(batches/\d+|record|scores|pipeline)\.json$")
PAGE = re.compile(r"report\.html$")

Marks = dict[str, str]
"""Path relative to the trial's folder → mark."""


def marks(
    folder: Path, roots: Iterable[str] = (OUTPUT, "saved", "groups", "scores.json", "tmpdir")
) -> Marks:
    """The marks of all files under the roots, and of single files of these names."""
    found = {}
    for root in roots:
        for path in [folder / root, *sorted((folder / root).rglob("*"))]:
            relative = path.relative_to(folder).as_posix()
            if path.is_file() and not IGNORED.search(relative):
                found[relative] = mark(path)
    return found


def mark(path: Path) -> str:
    """The hash of a file without times; of its bytes if it cannot be read as it should."""
    data = path.read_bytes()
    name = path.as_posix()
    try:
        if path.parent.name == ".sha256" and TIMED.search(name):
            data = b"checksum of a time"
        elif path.name == "manifest.json":
            data = _text(_without_checksums_of_times(json.loads(data)))
        elif TIMED.search(name) and name.endswith(".json"):
            data = _text(_without_times(json.loads(data)))
        elif TIMED.search(name):
            data = b"a time" if 0 <= float(data) < 1e6 else data
    except (ValueError, TypeError, AttributeError, KeyError):
        pass
    return hashlib.sha256(data).hexdigest()


def _text(data: Any) -> bytes:
    return json.dumps(data, sort_keys=True).encode()


def _without_times(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _without_times(entry) for name, entry in data.items() if name not in TIMES}
    return data


def _without_checksums_of_times(manifest: dict[str, Any]) -> Any:
    files = {n: None if TIMED.search(n) else entry for n, entry in manifest["files"].items()}
    return _without_times({**manifest, "files": files})


def let_time_pass(folder: Path) -> None:
    """Make the temporary files of dead processes as old as those that the next command deletes."""
    for path in folder.rglob(f".*{TEMPORARY}"):
        os.utime(path, (time.time() - 2 * ABANDONED,) * 2)


def identity(folder: Path, names: Iterable[str]) -> dict[str, tuple[int, int]]:
    """Name → (inode, time of change) of the files that exist: equal if a file was not written."""
    found = {}
    for name in names:
        if (folder / name).is_file():
            status = (folder / name).stat()
            found[name] = (status.st_ino, status.st_mtime_ns)
    return found


def differences(found: Marks, expected: Marks, aside: bool = False) -> list[str]:
    """One line per file that is missing, differs, or should not be there.

    aside: damaged products may have been put aside, and are missing if nothing needs them.
    """
    lines = []
    put_aside = {_product(name) for name in found if ASIDE.search(name)}
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            if not (aside and _product(name) in put_aside):
                lines.append(f"{name} is missing")
        elif name not in expected:
            if not (aside and ASIDE.search(name)):
                lines.append(f"{name} is left over")
        elif found[name] != expected[name]:
            lines.append(f"{name} differs")
    return lines


def _product(name: str) -> str:
    """STAGE/KEY of a file of a product."""
    return "/".join(name.split("/")[:3]).partition(".")[0]


def without(expected: Marks, gone: str, folder: Path) -> Marks:
    """`expected` without the files of folder `gone` that are not there: nothing needs them."""
    return {
        name: value
        for name, value in expected.items()
        if not name.startswith(f"{gone}/") or (folder / name).is_file()
    }


def wrong_numbers(found: Marks, expected: Marks, aside: bool = True) -> list[str]:
    """One line per finished file that differs from what it should be; others may be missing."""
    return [
        f"{name} differs"
        for name, value in found.items()
        if name in expected and value != expected[name]
    ] + [
        f"{name} should not be there"
        for name in found
        if name not in expected
        and not UNFINISHED.search(name)
        and not (aside and ASIDE.search(name))
    ]


def finished_files(folder: Path) -> dict[str, tuple[int, int]]:
    """`identity` of the files that a command which resumes must keep, by their final names.

    These are all files of finished products, and the finished pieces of unfinished ones.
    """
    kept: dict[str, tuple[int, int]] = {}
    for manifest in folder.glob(f"{OUTPUT}/*/*/manifest.json"):
        product = manifest.parent
        if "." not in product.name:
            names = [p.relative_to(folder).as_posix() for p in product.rglob("*") if p.is_file()]
            kept |= identity(folder, names)
    for partial in folder.glob(f"{OUTPUT}/*/*.partial"):
        pieces = [*partial.glob("*.safetensors")] if partial.parent.name != "inputs" else []
        for done in partial.glob("batches/*.json"):
            pieces += [done, *_images_of(done)]
        if partial.parent.name in ("quantised", "embeddings", "images"):
            for path in pieces:
                name = path.relative_to(folder).as_posix()
                for final, value in identity(folder, [name]).items():
                    kept[final.replace(".partial", "")] = value
    kept |= identity(
        folder, [p.relative_to(folder).as_posix() for p in folder.glob("groups/*.safetensors")]
    )
    return kept


def _images_of(done: Path) -> list[Path]:
    try:
        names: Mapping[str, str] = json.loads(done.read_text())["images"]
    except (ValueError, KeyError):
        return []
    return [done.parent.parent / f"{name}.png" for name in names]


def made_again(folder: Path, kept: Mapping[str, tuple[int, int]]) -> list[str]:
    """One line per file of `finished_files` that was written again."""
    now = identity(folder, kept)
    return [f"{name} was made again" for name, value in kept.items() if now.get(name) != value]
