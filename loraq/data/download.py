"""Download the files of a hub data set: resumable, verified by the hub's checksums.

huggingface_hub resumes a download only within one process; here an archive of 11 GB also resumes
after the process was killed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.disk_errors import disk_error

CHUNK = 1 << 20
ATTEMPTS = 5


def download_files(hub: str, patterns: Sequence[str], folder: Path, progress: bool) -> str:
    """Download the files of data set `hub` that match a pattern; returns the commit.

    Files in `folder` with the right checksum are kept. LoraqError if the download fails.
    """
    from huggingface_hub import HfApi

    try:
        commit = str(HfApi().dataset_info(hub, timeout=10).sha)
        names = HfApi().list_repo_files(hub, repo_type="dataset", revision=commit)
        for name in names:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                _download_file(hub, commit, name, folder, progress)
    except LoraqError:
        raise
    except Exception as error:  # huggingface_hub also raises the errors of its HTTP client
        if isinstance(error, OSError) and (told := disk_error(error, folder)) is not error:
            raise told from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"fetch: the download of {hub} failed ({reason[:160]}). Run the same command again: it "
            "resumes; without network access, copy the folder from another machine."
        ) from None
    return commit


def _download_file(hub: str, commit: str, name: str, folder: Path, progress: bool) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(hub, name, repo_type="dataset", revision=commit)
    metadata = get_hf_file_metadata(url, timeout=10)
    target, size, etag = folder / name, metadata.size or 0, (metadata.etag or "").strip('"')
    if target.is_file() and _matches(target, size, etag):
        return
    part = folder / f"{name}.{etag[:12]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _resume(url, part, size, name, progress)
            break
        except Exception as error:
            if isinstance(error, OSError) or attempt == ATTEMPTS - 1:  # a full disk stays full
                raise
            time.sleep(0.2 * 2**attempt)
    if not _matches(part, size, etag):
        part.unlink()
        raise LoraqError(
            f"fetch: '{name}' does not match the hub's size and checksum ({size} bytes, "
            f"{etag[:12]}…). It was deleted; run the same command again."
        )
    os.replace(part, target)


def _resume(url: str, part: Path, size: int, name: str, progress: bool) -> None:
    """Download the missing part of a file and append it."""
    from huggingface_hub.utils import build_hf_headers, get_session
    from tqdm import tqdm

    start = part.stat().st_size if part.is_file() else 0
    if start >= size:
        return
    headers = {**build_hf_headers(), **({"Range": f"bytes={start}-"} if start else {})}
    options: dict[str, Any] = {"headers": headers, "follow_redirects": True, "timeout": 30}
    with get_session().stream("GET", url, **options) as answer:
        answer.raise_for_status()
        if answer.status_code == 200:  # the server ignores ranges and sends the complete file
            start = 0
        bar = tqdm(
            total=size, initial=start, desc=name, unit="B", unit_scale=True, disable=not progress
        )
        with bar, open(part, "r+b" if start else "wb") as stream:
            stream.seek(start)
            for data in answer.iter_bytes(CHUNK):
                stream.write(data)
                bar.update(len(data))


def _matches(path: Path, size: int, etag: str) -> bool:
    """Whether a file matches size and etag (sha256 of large files, git's sha1 of small ones)."""
    if path.stat().st_size != size:
        return False
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with open(path, "rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
    return digest.hexdigest() == etag
