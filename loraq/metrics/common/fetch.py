"""Download the published weights of metrics into the cache: resumable, verified."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from loraq.errors import LoraqError
from loraq.metrics.common.weights import PublishedFile, Weights, is_published
from loraq.utils.assets import cache_folder, offline
from loraq.utils.console import size_text
from loraq.utils.download import check_space, download_file, reporting_download_errors
from loraq.utils.output_folder import folder_lock


def fetch_weights(
    wanted: Sequence[Weights], show: Callable[[str], None], progress: bool = True
) -> None:
    """Download the files that are missing from the cache or have other contents.

    show: called with each line of output; sizes come before the first download. LoraqError without
    network access, if a download fails, or if a file is not the published one.
    """
    lacking = {weights.name: _lacking(weights) for weights in wanted}
    for weights in wanted:
        size = sum(file.size for file in lacking[weights.name])
        state = f"{size_text(size)} to download" if size else "complete and verified"
        show(f"{weights.name:22} {size_text(weights.size):>7}  {state}  ({weights.source})")
    if total := sum(file.size for files in lacking.values() for file in files):
        if offline():
            raise LoraqError(
                "fetch weights: the environment is set to offline (HF_HUB_OFFLINE). Unset it, or "
                f"copy the folder '{cache_folder()}' from another machine."
            )
        check_space(cache_folder(), total, "fetch weights")
        for weights in wanted:
            with folder_lock(weights.folder):  # a process that waited finds what the other fetched
                for file in _lacking(weights):
                    _download(weights, file, progress)
    show(f"In {cache_folder()}. Runs find these weights there, offline too.")
    for weights in wanted:
        if weights.named():
            show(f"{weights.variable}={weights.named()} is set: runs use those files instead.")


def _lacking(weights: Weights) -> list[PublishedFile]:
    paths = [(weights.folder / file.name, file) for file in weights.files]
    return [file for path, file in paths if not (path.is_file() and is_published(path, file))]


def _download(weights: Weights, file: PublishedFile, progress: bool) -> None:
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url, headers = weights.repository + file.name, None
    if weights.revision:
        url = hf_hub_url(weights.repository, file.name, revision=weights.revision)
        headers = build_hf_headers()  # the user's token: for the hub alone
    target = weights.folder / file.name
    with reporting_download_errors(weights.source, cache_folder()):
        download_file(url, target, file.size, file.sha256, progress, headers)
