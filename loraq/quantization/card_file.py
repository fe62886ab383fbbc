"""Cards as files: signed, so that edited ones are known, and read beside a model's own source."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.repocard import metadata_load
from torch import nn

from loraq.models.denoisers import joined
from loraq.models.finite import stored_tensors

CARD, INDEX = "README.md", "model_index.json"
TENSORS = "tensors of sha256 "
"""Stands before the hash of what was measured, in a card with scores."""
_LICENCE = ("license", "license_name", "license_link")
_MARK = "\n<!-- a card by LoRaQ; sha256 of the text above: {} -->\n"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """What a model was loaded from: its name on the hub, and what the card there says.

    base: None if it is not known. licence: entries of the header. scores: Markdown of a card of
        ours that nobody has edited, else empty.
    """

    base: str | None
    licence: Mapping[str, Any]
    scores: str


def read_source(owner: Any, network: Any) -> Source:
    """The source of a quantised `network` of the pipeline `owner`, or of itself.

    A pipeline may have been given another network than its own, so that the network's source comes
    first. A folder's own name stays unnamed: it means nothing elsewhere.
    """
    names = (str(one.config.get("_name_or_path") or "") for one in (network, owner))
    name = next(filter(None, names), "")
    folder = Path(name)
    if name and folder.is_dir():
        roots = (place for place in (folder, folder.parent) if (place / INDEX).is_file())
        card: Any = next(roots, folder) / CARD
        cached = re.search(r"models--([\w.-]+?)--([\w.-]+)", folder.absolute().as_posix())
        base = "/".join(cached.groups()) if cached else None
    else:
        base = name if _HUB_ID.fullmatch(name) else None
        card = try_to_load_from_cache(base, CARD) if base else None
    if not isinstance(card, str | Path) or not Path(card).is_file():
        return Source(base, {}, "")
    header = _header(Path(card))
    if "loraq" in (header.get("tags") or ()):  # a packed checkpoint, saved again
        base = header.get("base_model")
    data = Path(card).read_bytes()
    text = data.decode() if is_card(data) else ""
    scores = text.partition("\n## Scores\n\n")[2].partition("\n\n## ")[0]
    return Source(base, {name: header[name] for name in _LICENCE if name in header}, scores)


def _header(card: Path) -> dict[str, Any]:
    """The YAML header of a card; empty if it has none that can be read."""
    try:
        return metadata_load(card) or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}


def signed(text: str) -> str:
    """The text of a card with its hash, as it is written."""
    return text + _MARK.format(_digest(text.encode()))


def is_card(data: bytes) -> bool:
    """Whether this is a card by LoRaQ that nobody has edited."""
    start, end = (part.encode() for part in _MARK.split("{}"))
    text, found, digest = data.rpartition(start)
    return bool(found) and digest == _digest(text).encode() + end


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()


def hash_of_tensors(owner: Any) -> str:
    """sha256 of the names, dtypes, shapes and values of a network's tensors, or a pipeline's."""
    held, found = getattr(owner, "components", {"": owner}), hashlib.sha256()
    for part, network in sorted(held.items()):
        state = network.state_dict() if isinstance(network, nn.Module) else {}
        for name, whole in sorted(state.items()):
            for key, tensor in stored_tensors(joined(part, name), whole):
                found.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
