"""Download a published prompt set with its images into a folder: resumable, verified, unpacked."""

from __future__ import annotations

import datetime
import json
import os
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from loraq.data.download import download_files
from loraq.data.manifest import INCOMPLETE, MANIFEST, read_manifest
from loraq.data.sets import PromptSet, find_prompt_set, read_prompt_set, real_image_paths
from loraq.errors import LoraqError
from loraq.utils.assets import offline
from loraq.utils.download import download_file, reporting_download_errors
from loraq.utils.files import write_text
from loraq.utils.hashing import file_hash
from loraq.utils.output_folder import folder_lock


def fetch_prompt_set(name: str, folder: Path, progress: bool = True) -> dict[str, Any]:
    """Download a prompt set into `folder` and write its manifest.

    Complete files in `folder` are kept. Returns the manifest: set, source, licence, commit, numbers
    of prompts and images; bytes and sha256 of every file. No other function of `loraq.data` uses
    the network. LoraqError if the set cannot be downloaded, without network access, or if the
    download fails.
    """
    chosen = find_prompt_set(name, "fetch")
    if chosen.hub is None and chosen.url is None:
        raise LoraqError(f"Set '{name}' is not on the hub. Get it from {chosen.source}.")
    if offline():
        raise LoraqError(
            f"fetch {name}: the environment is set to offline (HF_HUB_OFFLINE). Unset it, or copy "
            f"the folder from another machine; source: {chosen.source}."
        )
    if folder.exists() and not folder.is_dir():
        raise LoraqError(f"'{folder}' is a file. Give a folder.")
    with folder_lock(folder):
        return _fetch(name, chosen, folder, progress)


def _fetch(name: str, chosen: PromptSet, folder: Path, progress: bool) -> dict[str, Any]:
    previous = (read_manifest(folder) or {}).get("files", {})
    write_text(folder / INCOMPLETE, name)
    if chosen.url is not None:
        with reporting_download_errors(chosen.url, folder):
            target = folder / chosen.files[0]
            download_file(chosen.url, target, chosen.size, chosen.sha256, progress)
        commit = chosen.url.split("/")[-5]
    else:
        assert chosen.hub is not None
        commit = download_files(chosen.hub, chosen.files, folder, progress)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for pattern in chosen.files
        for path in sorted(folder.glob(pattern))
    }
    for archive in chosen.archives:
        if archive in previous and previous[archive] != files[archive]:
            shutil.rmtree(_unpacked_folder(folder, archive), ignore_errors=True)
    unpacked = {archive: _unpack(folder, archive, progress) for archive in chosen.archives}
    prompts = read_prompt_set(name, _single_file(folder, chosen.prompts), "", "fetch")
    images = 0
    if chosen.image is not None:
        images = len(real_image_paths(name, folder, [prompt.name for prompt in prompts]))
    manifest = {
        "set": name,
        "source": chosen.source,
        "licence": chosen.licence,
        "commit": commit,
        "fetched": datetime.date.today().isoformat(),
        "prompts": len(prompts),
        "images": images,
        "unpacked": unpacked,
        "files": files,
    }
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1))
    (folder / INCOMPLETE).unlink()
    return manifest


def _single_file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise LoraqError(f"fetch: '{folder}' has {len(found)} files {pattern} instead of one.")
    return found[0]


def describe_prompt_set(manifest: dict[str, Any], folder: Path) -> str:
    """A summary of a manifest for the command line."""
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    images = f", {manifest['images']} images" if manifest["images"] else ""
    return (
        f"{folder}: {manifest['set']}, {manifest['prompts']} prompts{images}, {size / 1e6:.1f} MB "
        f"downloaded\n  licence: {manifest['licence']}\n  source:  {manifest['source']}"
    )


def _unpacked_folder(folder: Path, archive: str) -> Path:
    return folder / archive.split(".")[0]


def _unpack(folder: Path, archive: str, progress: bool) -> int:
    """Unpack into a folder with the archive's name, atomically; returns the number of files.

    If the archive contains a single folder, that folder is used. The libraries refuse paths that
    lead outside of the target.
    """
    path, target = folder / archive, _unpacked_folder(folder, archive)
    if not target.is_dir():
        partial = folder / f"{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            _extract(path, partial, progress)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, OSError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise LoraqError(
                f"'{path}' cannot be unpacked ({error}). Free disk space, or delete it and fetch "
                "again."
            ) from None
        inside = list(partial.iterdir())
        single = len(inside) == 1 and inside[0].is_dir()
        os.replace(inside[0] if single else partial, target)
        shutil.rmtree(partial, ignore_errors=True)
    return sum(1 for entry in target.rglob("*") if entry.is_file())


def _extract(path: Path, target: Path, progress: bool) -> None:
    from tqdm import tqdm

    bar = {"desc": f"unpack {path.name}", "unit": "file", "disable": not progress}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as pack:
            for member in tqdm(pack.infolist(), **bar):
                pack.extract(member, target)
    else:
        with tarfile.open(path) as pack:
            for entry in tqdm(pack, **bar):
                pack.extract(entry, target, filter="data")
