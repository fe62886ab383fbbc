"""The command `loraq` with another table of published weights, without torch.

python -m tests.metrics.with_table TABLE.json ARGUMENTS…
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loraq.cli import main
from loraq.metrics.common.published import INCEPTION, PUBLISHED
from loraq.metrics.common.weights import PublishedFile


@contextlib.contextmanager
def use_table(table: Mapping[str, Any]) -> Iterator[None]:
    """The published weights are those of `table` while the block runs: see `stand_in.table_of`."""
    before = [(weights, weights.files, weights.repository) for weights in PUBLISHED]
    for weights in PUBLISHED:
        listed = tuple(PublishedFile(*entry) for entry in table["files"][weights.name])
        object.__setattr__(weights, "files", listed)
    object.__setattr__(INCEPTION, "repository", table["address"])
    try:
        yield
    finally:
        for weights, files, repository in before:
            object.__setattr__(weights, "files", files)
            object.__setattr__(weights, "repository", repository)


if __name__ == "__main__":
    with use_table(json.loads(Path(sys.argv[1]).read_text())):
        main(sys.argv[2:])
