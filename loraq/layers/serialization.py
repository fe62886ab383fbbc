"""Which tensors packed layers are made of: layers to (entries, tensors) and back.

Entries are plain JSON: of each layer its formats and transform, and the name below which each
operand's tensors lie. Layers that share R or a transform name the same tensors, stored once.
Tensors are named LAYER.OPERAND.SUFFIX: OPERAND weight, left, right or transform, SUFFIX as
`QuantizedTensor.tensors` and `InputTransform.tensors` call them; and LAYER.bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraq.formats import Format, QuantizedTensor, stored_shapes
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.transforms.input_transform import InputTransform

Parts = dict[str, dict[str, Tensor]]


def describe(layers: Mapping[str, LayerTensors]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(entries, tensors) of packed layers."""
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
                "smooth": layer.transform.smooth_I is not None,
            },
            "bias": layer.bias_O is not None,
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
    return entries, tensors


def rebuild(entries: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, LayerTensors]:
    """The inverse of `describe`; KeyError names a tensor that is missing."""
    held: dict[str, Any] = {}
    layers, parts = {}, _by_prefix(tensors)
    for name, entry in entries.items():
        operands = {
            operand: _operand(entry[operand], parts, held)
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
            transform=_transform(entry["transform"], width, parts, held),
            bias_O=tensors.get(f"{name}.bias"),
        )
    return layers


def planned(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor that the entries speak of, on the meta device."""
    found: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        found[name] = torch.empty(shape, dtype=dtype, device="meta")

    for name, entry in entries.items():
        for operand in OPERANDS:
            if operand in entry:
                held = entry[operand]
                stored = stored_shapes(tuple(held["shape"]), Format(**held["format"]))
                for suffix, (shape, dtype) in stored.items():
                    add(f"{held['tensors']}.{suffix}", shape, dtype)
        transform, width = entry["transform"], entry["weight"]["shape"][-1]
        if transform["smooth"]:
            add(f"{transform['tensors']}.smooth", (width,), torch.bfloat16)
        if transform["block"]:
            add(f"{transform['tensors']}.signs", (-(-width // 8),), torch.uint8)
        if entry["bias"]:
            add(f"{name}.bias", (entry["weight"]["shape"][0],), torch.float32)
    return found


def _operand(entry: dict, parts: Parts, held: dict[str, Any]) -> QuantizedTensor:
    prefix = entry["tensors"]
    if prefix not in held:
        held[prefix] = QuantizedTensor.from_tensors(
            parts.get(prefix, {}), tuple(entry["shape"]), Format(**entry["format"])
        )
    packed: QuantizedTensor = held[prefix]
    return packed


def _transform(entry: dict, width: int, parts: Parts, held: dict[str, Any]) -> InputTransform:
    prefix = entry["tensors"]
    if prefix not in held:
        held[prefix] = InputTransform.from_tensors(
            parts.get(prefix, {}), width, entry["block"], entry["shift"]
        )
    transform: InputTransform = held[prefix]
    return transform


def _by_prefix(tensors: Mapping[str, Tensor]) -> Parts:
    """The tensors named PREFIX.SUFFIX: prefix -> suffix -> tensor."""
    found: Parts = {}
    for name, tensor in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        found.setdefault(prefix, {})[suffix] = tensor
    return found


def _plain(fmt: Format | None) -> dict | None:
    return None if fmt is None else dataclasses.asdict(fmt)
