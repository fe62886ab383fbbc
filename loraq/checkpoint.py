"""Packed layers in a safetensors file: one file per finished group of layers.

The header's metadata holds the layout as JSON: for each layer its formats and transform, and the
name of each operand's tensors. Layers that share R or a transform name the same tensors, which are
stored once.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor
from loraq.layers import LayerTensors
from loraq.transforms import InputTransform

LAYOUT = "1"
OPERANDS = ("weight", "left", "right")


def save_group(path: Path, layers: dict[str, LayerTensors], info: dict[str, Any]) -> None:
    """Write the group's packed tensors and `info`; aside first, then renamed."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    stored_as: dict[int, str] = {}
    for name, layer in layers.items():
        entry: dict[str, Any] = {
            "activation": dataclasses.asdict(layer.activation),
            "branch_activation": _plain(layer.branch_activation),
            "requantize_intermediate": layer.requantize_intermediate,
            "transform": {
                "tensors": stored_as.setdefault(id(layer.transform), f"{name}.transform"),
                "block": layer.transform.block,
                "shift": layer.transform.shift,
            },
        }
        for operand in OPERANDS:
            packed: QuantizedTensor | None = getattr(layer, operand)
            if packed is None:
                continue
            prefix = stored_as.setdefault(id(packed), f"{name}.{operand}")
            for suffix, tensor in packed.tensors().items():
                tensors[f"{prefix}.{suffix}"] = tensor.contiguous()
            entry[operand] = {
                "tensors": prefix,
                "shape": list(packed.shape),
                "format": dataclasses.asdict(packed.format),
            }
        for suffix, tensor in layer.transform.tensors().items():
            tensors[f"{entry['transform']['tensors']}.{suffix}"] = tensor.contiguous()
        if layer.bias_O is not None:
            tensors[f"{name}.bias"] = layer.bias_O.contiguous()
        entries[name] = entry
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
    held: dict[str, Any] = {}
    layers = {}
    for name, entry in json.loads(metadata["layers"]).items():
        operands = {
            operand: _operand(entry[operand], tensors, held)
            for operand in OPERANDS
            if operand in entry
        }
        width = operands["weight"].shape[-1]
        branch_activation = entry["branch_activation"]
        layers[name] = LayerTensors(
            **operands,
            activation=Format(**entry["activation"]),
            branch_activation=None if branch_activation is None else Format(**branch_activation),
            requantize_intermediate=entry["requantize_intermediate"],
            transform=_transform(entry["transform"], width, tensors, held),
            bias_O=tensors.get(f"{name}.bias"),
        )
    return layers, json.loads(metadata["info"])


def _operand(entry: dict, tensors: dict[str, Tensor], held: dict[str, Any]) -> QuantizedTensor:
    prefix = entry["tensors"]
    if prefix not in held:
        held[prefix] = QuantizedTensor.from_tensors(
            _below(prefix, tensors), tuple(entry["shape"]), Format(**entry["format"])
        )
    packed: QuantizedTensor = held[prefix]
    return packed


def _transform(
    entry: dict, width: int, tensors: dict[str, Tensor], held: dict[str, Any]
) -> InputTransform:
    prefix = entry["tensors"]
    if prefix not in held:
        held[prefix] = InputTransform.from_tensors(
            _below(prefix, tensors), width, entry["block"], entry["shift"]
        )
    transform: InputTransform = held[prefix]
    return transform


def _below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors named PREFIX.SUFFIX, by suffix."""
    return {
        key.rsplit(".", 1)[1]: tensor
        for key, tensor in tensors.items()
        if key.rsplit(".", 1)[0] == prefix
    }


def _plain(fmt: Format | None) -> dict | None:
    return None if fmt is None else dataclasses.asdict(fmt)
