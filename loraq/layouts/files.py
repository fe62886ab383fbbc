"""Reading and writing of safetensors files whose tensors are named LAYER.SUFFIX."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from loraq.errors import LoraqError, did_you_mean, near_matches
from loraq.utils.files import replacing, sort_metadata, write_text

WEIGHTS = "diffusion_pytorch_model.safetensors"
CONFIG = "config.json"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
Spec = Mapping[str, tuple[Sequence[int], torch.dtype | Sequence[torch.dtype]]]
"""SUFFIX → (shape, dtype or allowed dtypes) of the tensors of one layer."""


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a folder, or the file itself; LoraqError without one."""
    found = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not found or not all(file.is_file() for file in found):
        raise LoraqError(
            f"'{path}' is no safetensors file, and no folder with one. Pass the file, or the "
            "folder of the transformer."
        )
    return found


def read_tensors(path: Path, only: Collection[str] | None = None) -> dict[str, Tensor]:
    """All tensors, or those of the names `only`, of a file or of the files in a folder.

    Raises LoraqError for a tensor in two files, as in a folder with several versions of a model.
    """
    found: dict[str, Tensor] = {}
    for held, names in _opened(path):
        for name in names:
            if name in found:
                raise LoraqError(f"Two files in '{path}' hold '{name}'. Pass one of the files.")
            if only is None or name in only:
                found[name] = held.get_tensor(name)
    return found


def read_names(path: Path) -> set[str]:
    """The names of all tensors; nothing else is read."""
    return {name for _, names in _opened(path) for name in names}


def read_dtypes(path: Path) -> dict[str, torch.dtype]:
    """The type of every tensor of 16- or 32-bit floats, by name."""
    found = {n: held.get_slice(n).get_dtype() for held, names in _opened(path) for n in names}
    return {name: _DTYPES[kind] for name, kind in found.items() if kind in _DTYPES}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata in the headers of the files."""
    found: dict[str, str] = {}
    for held, _ in _opened(path):
        found |= held.metadata() or {}
    return found


def metadata_object(path: Path, key: str) -> dict[str, Any]:
    """The JSON object under a key of the metadata; empty without it."""
    try:
        return dict(json.loads(read_metadata(path).get(key, "{}")))
    except (TypeError, ValueError) as error:
        raise LoraqError(
            f"The metadata of '{path}' has no JSON object as '{key}' ({error}). Restore the file."
        ) from error


def read_config(path: Path) -> dict[str, Any]:
    """The contents of a folder's `config.json`; empty for a file or a folder without one."""
    file = path / CONFIG
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise LoraqError(f"'{file}' is no JSON ({error}). Restore it.") from error
    return found if isinstance(found, dict) else {}


def quantization_config(path: Path) -> dict[str, Any]:
    """That part of a folder's `config.json`; empty without one."""
    found = read_config(path).get("quantization_config")
    return found if isinstance(found, dict) else {}


def _opened(path: Path) -> Iterator[tuple[Any, list[str]]]:
    for file in weight_files(path):
        try:
            with safe_open(str(file), "pt") as held:
                yield held, list(held.keys())
        except SafetensorError as error:
            raise LoraqError(f"'{file}' is damaged ({error}). Restore it.") from error


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """A safetensors file; every tensor has its own storage in it."""
    held = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    for name, tensor in held.items():
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            held[name] = tensor.clone()
    with replacing(path) as temporary:
        save_file(held, temporary, {"format": "pt", **(metadata or {})})
        sort_metadata(temporary)


def write_layers(
    path: Path,
    layers: Mapping[str, Mapping[str, Tensor | None]],
    others: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """The inverse of `by_layer`: layer → suffix → tensor, of which None is left out, and others."""
    named = {
        f"{name}.{suffix}": tensor
        for name, held in layers.items()
        for suffix, tensor in held.items()
        if tensor is not None
    }
    write_tensors(path, {**others, **named}, metadata)


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """A JSON file of settings, in the order given."""
    write_text(path, json.dumps(settings, indent=2) + "\n")


def write_config(folder: Path, network: Any, quantization: Mapping[str, Any] | None) -> None:
    """`config.json` of a network of diffusers, with another `quantization_config` or none.

    A network without a configuration, which is none of diffusers, gets the latter alone.
    """
    added = {} if quantization is None else {"quantization_config": quantization}
    write_settings(folder / CONFIG, own_config(network) | added)


def own_config(network: Any) -> dict[str, Any]:
    """The configuration of a network of diffusers without its `quantization_config`; else empty."""
    own = json.loads(network.to_json_string()) if hasattr(network, "to_json_string") else {}
    own.pop("quantization_config", None)
    return dict(own)


def by_layer(
    tensors: Mapping[str, Tensor], marker: str
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """(layer → suffix → tensor, all other tensors); a layer has a tensor LAYER.`marker`."""
    end = f".{marker}"
    layers: dict[str, dict[str, Tensor]] = {
        name.removesuffix(end): {} for name in tensors if name.endswith(end)
    }
    others = {}
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if layer in layers:
            layers[layer][suffix] = tensor
        else:
            others[name] = tensor
    return layers, others


def check_tensors(
    layer: str, held: Mapping[str, Tensor], expected: Spec, optional: Sequence[str] = ()
) -> None:
    """LoraqError unless a layer's tensors are those of `expected` by name, shape and dtype."""
    for suffix in held:
        if suffix not in expected:
            close = did_you_mean(near_matches(suffix, expected))
            raise LoraqError(f"'{layer}.{suffix}' is no tensor of this layout.{close}")
    for suffix, (shape, allowed) in expected.items():
        if suffix not in held:
            if suffix in optional:
                continue
            raise LoraqError(f"'{layer}.{suffix}' is missing. Restore the file.")
        found = held[suffix]
        dtypes = (allowed,) if isinstance(allowed, torch.dtype) else tuple(allowed)
        if tuple(found.shape) != tuple(shape) or found.dtype not in dtypes:
            raise LoraqError(
                f"'{layer}.{suffix}' is {tuple(found.shape)} of {found.dtype}, and this layout has "
                f"{tuple(shape)} of {' or '.join(map(str, dtypes))}."
            )
