"""What a fetched folder holds, and whether it is whole: MANIFEST written last, INCOMPLETE first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError

MANIFEST = "loraq_manifest.json"
INCOMPLETE = ".loraq_incomplete"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The folder's manifest; None where it was filled by hand."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    except ValueError as error:
        raise LoraqError(f"'{path}' cannot be read ({error}). Delete it and fetch again.") from None


def check(folder: Path) -> None:
    """LoraqError for a download that was interrupted, and for files that are not as it left them.

    Sizes are compared here; `loraq fetch` compares sha256 sums as well.
    """
    marker = folder / INCOMPLETE
    if marker.is_file():
        raise LoraqError(
            f"'{folder}' is not complete: its download was interrupted. `loraq fetch "
            f"{marker.read_text().strip()} {folder}` goes on where it stopped."
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
                f"'{path}' has {size} bytes and {MANIFEST} says {entry['bytes']}. `loraq fetch "
                f"{manifest['set']} {folder}` restores it."
            )
