"""The products under an output folder as text, for `loraq cache`; verifies and removes them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Literal

from loraq.runner.store import Store

Removable = Literal["partial", "corrupted"]


def list_products(output: Path, verify: bool = False, remove: Removable | None = None) -> str:
    """One line per product: stage, key, state, size in MB; the last line has the total.

    verify: check the sha256 of all files; corrupted products are renamed. remove: delete the
    products in this state.
    """
    store, lines, total = Store(output), [], 0
    for stage, name, state, size in list(store.products()):
        shown: str = state
        if verify and state == "finished" and not store.finished(stage, name):
            shown = "corrupted"
        if remove == shown:
            shutil.rmtree(store.path(stage, f"{name}.{shown}"))
            shown = "removed"
        total += size if shown != "removed" else 0
        lines.append(f"{stage:10} {name}  {shown:9} {size / 1e6:10.2f} MB")
    lines.append(f"{total / 1e6:.2f} MB in {output}/")
    return "\n".join(lines)
