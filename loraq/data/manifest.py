"""The manifest of a downloaded folder, and the check that the folder is complete.

A download writes INCOMPLETE first and MANIFEST last.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.plain import parse_json

MANIFEST = "loraq_manifest.json"
INCOMPLETE = ".loraq_incomplete"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None if `loraq fetch` did not make the folder."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        for entry in found["files"].values():
            _ = entry["bytes"], entry["sha256"], found["set"], found["unpacked"]
        return found
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise LoraqError(
            f"'{path}' cannot be read ({type(error).__name__}: {error}). Delete it and fetch again."
        ) from None


def check_complete(folder: Path) -> None:
    """LoraqError for an interrupted download, or for files that have changed since.

    Compares the sizes of the files; `loraq fetch` also compares their sha256.
    """
    marker = folder / INCOMPLETE
    if marker.is_file():
        raise LoraqError(
            f"'{folder}' is not complete: its download was interrupted. `loraq fetch "
            f"{marker.read_text().strip()} {folder}` resumes it."
        )
    manifest = read_manifest(folder)
    if manifest is None:
        return
    for name, entry in manifest["files"].items():
        path = folder / name
        if name in manifest["unpacked"] and not path.exists():
            continue  # an archive may be deleted once it is unpacked
        size = path.stat().st_size if path.is_file() else 0
        if size != entry["bytes"]:
            raise LoraqError(
                f"'{path}' has {size} bytes, {MANIFEST} says {entry['bytes']}. `loraq fetch "
                f"{manifest['set']} {folder}` restores it."
            )
