"""The published weights of a metric's network: found in one folder for all runs, and verified.

The folder is `$HF_HOME/loraq`, beside the hub's models. An environment variable may name other
files instead.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from loraq.errors import LoraqError
from loraq.utils.assets import cache_folder
from loraq.utils.console import size_text
from loraq.utils.hashing import cached_hash, check_sha256sums


class PublishedFile(NamedTuple):
    """A published file: its size in bytes and its sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Weights:
    """The published files of one network.

    metrics: the names that need it, as in `metrics.names` or in a table.
    variable: the environment variable that names other files, which then are used as they are.
    repository: of the hub, read at the commit `revision`; or an address that ends in `/`.
    extractor: the feature extractor with which the metrics need it; empty: always.
    """

    name: str
    metrics: tuple[str, ...]
    variable: str
    repository: str
    revision: str
    files: tuple[PublishedFile, ...]
    extractor: str = ""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def folder(self) -> Path:
        """The folder in the cache, which may not exist."""
        return cache_folder() / self.name

    @property
    def command(self) -> str:
        """The command that downloads the files."""
        return f"loraq fetch weights --only {self.metrics[0]}"

    @property
    def source(self) -> str:
        """Where the files come from, for a reader."""
        if not self.revision:
            return self.repository
        return f"huggingface.co/{self.repository} at {self.revision[:12]}"

    def named(self) -> str:
        """The value of the variable; empty if the cache's files are used."""
        return os.environ.get(self.variable, "")

    def missing(self) -> list[PublishedFile]:
        """The files that are not in the cache; none if the variable names others."""
        if self.named():
            return []
        return [file for file in self.files if not (self.folder / file.name).is_file()]

    def hashes(self, what: str) -> dict[str, str]:
        """File name → sha256 of the cache's files, also of those that are still to be downloaded.

        what: the setting or metric, for errors. LoraqError for a file with other contents.
        """
        missing = self.missing()
        for file in self.files:
            path = self.folder / file.name
            if file not in missing and not is_published(path, file):
                raise LoraqError(
                    f"{what}: '{path}' is not the published file ({file.size} bytes, sha256 "
                    f"{file.sha256[:12]}…). Replace it: {self.command}"
                )
        return {file.name: file.sha256 for file in self.files}

    def describe_missing(self) -> str:
        """'a.pt, b.json (96 MB) in FOLDER', of the files that are not in the cache."""
        missing = self.missing()
        size = size_text(sum(file.size for file in missing))
        return f"{', '.join(file.name for file in missing)} ({size}) in '{self.folder}'"

    def locate(self, what: str) -> Path:
        """The cache's folder, with all files verified; LoraqError if one is missing or damaged."""
        if self.missing():
            raise LoraqError(
                f"{what} needs {self.describe_missing()}. Download them: {self.command}\n  Or set "
                f"{self.variable} to a folder that holds them ({self.source})."
            )
        self.hashes(what)
        return self.folder

    def named_folder(self, what: str, files: Collection[str]) -> Path:
        """The folder that the variable names; LoraqError without one of `files` in it.

        Files that its SHA256SUMS lists must match.
        """
        folder = Path(self.named()).expanduser()
        if missing := [name for name in files if not (folder / name).is_file()]:
            raise LoraqError(
                f"{what} needs {' and '.join(missing)} in the folder {self.variable}="
                f"{self.named()!r}. Correct the variable; or unset it, and run: {self.command}"
            )
        check_sha256sums(folder, tuple(files), what)
        return folder


def is_published(path: Path, file: PublishedFile) -> bool:
    """Whether `path` has the file's contents; its hash is cached until it changes."""
    return path.stat().st_size == file.size and cached_hash(path) == file.sha256
