"""The products under an output folder as text, for `loraq cache`; verifies and removes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from loraq.errors import LoraqError
from loraq.runner.store import Store

Removable = Literal["partial", "corrupted"]


def list_products(output: Path, verify: bool = False) -> str:
    """One line per product: stage, key, state, size in MB; the last line has the total.

    verify: check the sha256 of all files. Changes nothing: a run may be reading the products.
    """
    store, lines, total = Store(output), [], 0
    for folder, state, size in store.products():
        reason = store.damage(*_product(folder)) if verify and state == "finished" else None
        line = _line(folder, state if reason is None else "corrupted", size)
        lines.append(line if reason is None else f"{line}  {reason}; the next run makes it again")
        total += size
    return "\n".join([*lines, f"{total / 1e6:.2f} MB in {output}/"])


def remove_products(
    output: Path, state: Removable, verify: bool, confirmed: Callable[[str], bool]
) -> str:
    """Delete the products in this state, except those that a process uses; returns what was done.

    verify: with "corrupted", check the sha256 of all files first. confirmed: called with one line
    per product to delete. Raises LoraqError if it answers False; nothing is deleted then.
    """
    if verify and state == "partial":
        raise LoraqError("--verify finds corrupted products. Use it with --remove corrupted.")
    store, lines, found = Store(output), [], []
    for folder, shown, size in store.products():
        if shown == state or (
            verify and shown == "finished" and store.damage(*_product(folder)) is not None
        ):
            in_use = store.locks.in_use(*_product(folder))
            if not in_use:
                found.append((folder, size))
            lines.append(_line(folder, "in use" if in_use else state, size))
    listed = "\n".join([*lines, f"{sum(size for _, size in found) / 1e6:.2f} MB to remove"])
    if found and not confirmed(listed):
        raise LoraqError("Nothing was removed. Add --yes to remove these products.")
    sizes = [size for folder, size in found if store.remove(folder)]
    locks = store.locks.remove_unused()
    done = f"{len(sizes)} {state} products and {locks} unused lock files removed"
    return "\n".join([*([] if found else lines), f"{done} ({sum(sizes) / 1e6:.2f} MB)"])


def _product(folder: Path) -> tuple[str, str]:
    return folder.parent.name, folder.name.partition(".")[0]


def _line(folder: Path, state: str, size: int) -> str:
    stage, name = _product(folder)
    return f"{stage:10} {name}  {state:9} {size / 1e6:10.2f} MB"
