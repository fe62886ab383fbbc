"""Packed layers in a safetensors file: one file per finished group of layers.

The header's metadata holds the entries of `loraq/layout.py` as JSON, and notes on the group.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.layers import LayerTensors
from loraq.layout import describe, rebuild

LAYOUT = "1"


def save_group(path: Path, layers: dict[str, LayerTensors], info: dict[str, Any]) -> None:
    """Write the group's packed tensors and `info`; aside first, then renamed."""
    from safetensors.torch import save_file

    entries, tensors = describe(layers)
    metadata = {"layout": LAYOUT, "layers": json.dumps(entries), "info": json.dumps(info)}
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file(tensors, aside, metadata=metadata)
        os.replace(aside, path)
    except OSError as error:
        raise LoraqError(f"Cannot write '{path}': {error}. Free space or set output=.") from None
    finally:
        aside.unlink(missing_ok=True)


def load_group(path: Path) -> tuple[dict[str, LayerTensors], dict[str, Any]]:
    """The layers and `info` of a file that `save_group` wrote; LoraqError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            tensors = {key: stream.get_tensor(key) for key in stream.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise LoraqError(f"'{path}' is damaged ({error}); delete it and run again.") from None
    if metadata.get("layout") != LAYOUT:
        raise LoraqError(
            f"'{path}' has layout {metadata.get('layout')!r}, this version reads {LAYOUT!r}; "
            "delete it and run again."
        )
    return rebuild(json.loads(metadata["layers"]), tensors), json.loads(metadata["info"])
