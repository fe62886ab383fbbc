"""Packed layers in a safetensors file: one file per finished group of layers.

The header's metadata holds the entries of `layers/serialization.py` as JSON and notes on the group.
Equal keys give equal bytes, so a group's run time is stored in a separate small file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.errors import LoraqError
from loraq.layers.serialization import deserialize_layers, serialize_layers
from loraq.layers.tensors import LayerTensors
from loraq.utils.files import replacing, sort_metadata
from loraq.utils.hashing import file_hash
from loraq.utils.pieces import keep_piece, remove_piece, write_checksum, write_piece
from loraq.utils.plain import parse_json
from loraq.utils.shape import check_shape

if TYPE_CHECKING:
    import torch

LAYOUT = "1"


def save_group(path: Path, layers: dict[str, LayerTensors], info: dict[str, Any]) -> None:
    """Write the group's packed tensors and `info` atomically, with a checksum."""
    from safetensors.torch import save_file

    entries, tensors = serialize_layers(layers)
    notes = {name: value for name, value in info.items() if name != "seconds"}
    metadata = {"layout": LAYOUT, "layers": json.dumps(entries), "info": json.dumps(notes)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)
        sort_metadata(temporary)
        if "seconds" in info:  # before the rename, which marks the group as finished
            write_piece(_seconds_file(path), f"{info['seconds']!r}\n".encode())
        write_checksum(path, file_hash(temporary))


def keep_group(path: Path) -> bool:
    """Whether a group that an earlier run saved is used; if it is damaged, it is deleted."""
    return keep_piece(path) and keep_piece(_seconds_file(path))


def group_files(names: Iterable[str]) -> list[str]:
    """The files of groups with these names."""
    return [f"{name}{ending}" for name in names for ending in (".safetensors", ".seconds")]


def remove_regrouped(folder: Path, names: Iterable[str]) -> None:
    """Delete groups that an earlier run numbered beyond those of `names`, as its were smaller."""
    made = set(names)
    kinds = {name.rpartition(".")[0] for name in made}
    for path in folder.glob("*.safetensors"):
        if path.stem not in made and path.stem.rpartition(".")[0] in kinds:
            remove_piece(path)
            remove_piece(_seconds_file(path))


def seconds_of_groups(folder: Path, names: Iterable[str]) -> float:
    """Seconds that the groups with these names took, summed over all processes and attempts."""
    return sum(float((folder / f"{name}.seconds").read_text(encoding="utf-8")) for name in names)


def _seconds_file(path: Path) -> Path:
    return path.with_suffix(".seconds")


def load_group(
    path: Path, device: torch.device | str = "cpu"
) -> tuple[dict[str, LayerTensors], dict[str, Any]]:
    """The layers, on `device`, and `info` of a file that `save_group` wrote.

    Raises LoraqError if the file is damaged or has another layout.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata() or {}
            # `.to`: safetensors reads "cuda" as GPU 0, not as this process's
            tensors = {key: stream.get_tensor(key).to(device) for key in stream.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise LoraqError(f"'{path}' is damaged ({error}); delete it and run again.") from None
    if metadata.get("layout") != LAYOUT:
        raise LoraqError(
            f"'{path}' has layout {metadata.get('layout')!r}, this version reads {LAYOUT!r}; "
            "delete it and run again."
        )
    try:
        info: dict[str, Any] = json.loads(metadata["info"])
        check_shape(info, {}, "info")
        if _seconds_file(path).is_file():
            info["seconds"] = float(_seconds_file(path).read_text(encoding="utf-8"))
        entries = parse_json(metadata["layers"])
        check_shape(entries, {}, "layers")
        return deserialize_layers(entries, tensors), info
    except (OSError, ValueError, KeyError, RecursionError, LoraqError) as error:
        raise LoraqError(f"'{path}' is damaged ({error}); delete it and run again.") from None
