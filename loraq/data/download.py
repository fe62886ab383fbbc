"""Download the files of a hub data set: resumable, verified by the hub's checksums."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from pathlib import Path

from loraq.utils.download import download_file, reporting_download_errors


def download_files(hub: str, patterns: Sequence[str], folder: Path, progress: bool) -> str:
    """Download the files of data set `hub` that match a pattern; returns the commit.

    Files in `folder` with the right checksum are kept. LoraqError if the download fails.
    """
    from huggingface_hub import HfApi

    with reporting_download_errors(hub, folder):
        commit = str(HfApi().dataset_info(hub, timeout=10).sha)
        names = HfApi().list_repo_files(hub, repo_type="dataset", revision=commit)
        for name in names:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
                _download_file(hub, commit, name, folder, progress)
    return commit


def _download_file(hub: str, commit: str, name: str, folder: Path, progress: bool) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(hub, name, repo_type="dataset", revision=commit)
    metadata = get_hf_file_metadata(url, timeout=10)
    size, etag = metadata.size or 0, (metadata.etag or "").strip('"')
    download_file(url, folder / name, size, etag, progress, build_hf_headers())
