"""A product's manifest: the sha256 and size of each of its files, and notes on how it was made.

Its entry `checksum` is the sha256 of all other entries as compact JSON with sorted names.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.files import write_json
from loraq.utils.hashing import file_hash, text_hash
from loraq.utils.pieces import CHECKSUM_FOLDER, MANIFEST, checksums
from loraq.utils.plain import to_plain


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest of a product with its checksum; the product is complete then."""
    plain = to_plain(manifest)
    write_json(folder / MANIFEST, plain | {"checksum": _checksum(plain)})


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a product, None if it is damaged; does not verify the files.

    A manifest of an earlier release has no checksum.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("checksum", None)
        if checksum not in (None, _checksum(manifest)):
            return None
        complete = all({"sha256", "size"} <= set(entry) for entry in manifest["files"].values())
        return manifest if complete and isinstance(manifest["info"], dict) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _checksum(manifest: dict[str, Any]) -> str:
    return text_hash(json.dumps(manifest, sort_keys=True, separators=(",", ":")))


def product_damage(
    folder: Path, pieces: Collection[str] = (), only: Collection[str] | None = None
) -> str | None:
    """Why a product cannot be used, None if it is complete and all files match the manifest.

    pieces: files that the manifest must list. only: verify no other files than these.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return f"no readable {MANIFEST}"
    files = manifest["files"]
    if missing := [name for name in (*pieces, *(only or ())) if name not in files]:
        return f"{missing[0]} is missing in {MANIFEST}"
    for name in files if only is None else only:
        path, entry = folder / name, files[name]
        if not path.is_file():
            return f"{name} is missing"
        try:
            same = path.stat().st_size == entry["size"] and file_hash(path) == entry["sha256"]
        except FileNotFoundError:  # another process has just renamed the product
            return f"{name} is missing"
        if not same:
            return f"{name} does not match its sha256"
    return None


def check_product(folder: Path, only: Collection[str]) -> None:
    """LoraqError if a file of `only` does not match the manifest of the product."""
    reason = product_damage(folder, only=only)
    if reason is not None:
        raise LoraqError(
            f"'{folder}' was changed after it was made: {reason}. Run the experiment again: it "
            "makes this product again."
        )


def certified_files(folder: Path, pieces: Collection[str]) -> dict[str, dict[str, Any]]:
    """The entries of a manifest for all files in `folder`, path → sha256 and size.

    pieces: files that must be there. LoraqError if one is missing, or if a file does not match the
    checksum with which it was written (`utils/pieces.py`); such a file is deleted.
    """
    written = checksums(folder)
    files: dict[str, dict[str, Any]] = {}
    changed = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_file() or name == MANIFEST or path.parent.name == CHECKSUM_FOLDER:
            continue
        sha256 = file_hash(path)
        if written.get(name, sha256) == sha256:
            files[name] = {"sha256": sha256, "size": path.stat().st_size}
        else:
            changed.append(name)
            path.unlink()
    lost = [name for name in pieces if name not in files and name not in changed]
    if changed or lost:
        raise LoraqError(
            f"'{folder}' cannot be finished: of its files, {len(lost)} are missing and "
            f"{len(changed)} were changed after they were written, the first is "
            f"'{(lost + changed)[0]}'. Run the same command again: it makes these files again."
        )
    return files
