"""Files of a hub data set, each resumed byte by byte and compared with the hub's own checksum.

The hub's library resumes within one process only; an archive of 11 GB should survive a kill.
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

CHUNK = 1 << 20
ATTEMPTS = 5


def download(hub: str, patterns: Sequence[str], folder: Path, progress: bool) -> str:
    """Every file of data set `hub` that fits a pattern, into `folder`; returns the commit.

    What is there already, of the right checksum, stays. LoraqError where the hub does not answer.
    """
    from huggingface_hub import HfApi

    try:
        commit = str(HfApi().dataset_info(hub, timeout=10).sha)
        there = HfApi().list_repo_files(hub, repo_type="dataset", revision=commit)
        for name in there:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                _file(hub, commit, name, folder, progress)
    except LoraqError:
        raise
    except Exception as error:  # the hub's library raises those of its HTTP client as they are
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise LoraqError(
            f"fetch: {hub} does not arrive ({reason[:160]}). The same command goes on where it "
            "stopped; without network, copy the folder from a machine that has it."
        ) from None
    return commit


def _file(hub: str, commit: str, name: str, folder: Path, progress: bool) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(hub, name, repo_type="dataset", revision=commit)
    about = get_hf_file_metadata(url, timeout=10)
    target, size, etag = folder / name, about.size or 0, (about.etag or "").strip('"')
    if target.is_file() and _is(target, size, etag):
        return
    part = folder / f"{name}.{etag[:12]}.part"
    part.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            _append(url, part, size, name, progress)
            break
        except Exception as error:
            if isinstance(error, OSError) or attempt == ATTEMPTS - 1:  # a full disk stays full
                raise
            time.sleep(0.2 * 2**attempt)
    if not _is(part, size, etag):
        part.unlink()
        raise LoraqError(
            f"fetch: '{name}' arrived, and is not what the hub says ({size} bytes, checksum "
            f"{etag[:12]}…). It was deleted; run the same command again."
        )
    os.replace(part, target)


def _append(url: str, part: Path, size: int, name: str, progress: bool) -> None:
    """Ask for what is missing of a file and append it."""
    from huggingface_hub.utils import build_hf_headers, get_session
    from tqdm import tqdm

    there = part.stat().st_size if part.is_file() else 0
    if there >= size:
        return
    headers = {**build_hf_headers(), **({"Range": f"bytes={there}-"} if there else {})}
    options: dict[str, Any] = {"headers": headers, "follow_redirects": True, "timeout": 30}
    with get_session().stream("GET", url, **options) as answer:
        answer.raise_for_status()
        if answer.status_code == 200:  # the server does not know ranges: all of it comes again
            there = 0
        bar = tqdm(
            total=size, initial=there, desc=name, unit="B", unit_scale=True, disable=not progress
        )
        with bar, open(part, "r+b" if there else "wb") as stream:
            stream.seek(there)
            for data in answer.iter_bytes(CHUNK):
                stream.write(data)
                bar.update(len(data))


def _is(path: Path, size: int, etag: str) -> bool:
    """Whether a file is the hub's: etags are sha256 of large files, git's sha1 of small ones."""
    if path.stat().st_size != size:
        return False
    digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(f"blob {size}\0".encode())
    with open(path, "rb") as stream:
        while data := stream.read(CHUNK):
            digest.update(data)
    return digest.hexdigest() == etag
