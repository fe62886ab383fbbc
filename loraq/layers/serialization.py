"""Serialisation of packed layers as (entries, tensors).

Entries are JSON: for each layer its formats and transform, and the name prefix of each operand's
tensors. Layers that share R or a transform name the same tensors, which are stored once. Tensors
are named LAYER.OPERAND.SUFFIX, with OPERAND weight, left, right or transform and the SUFFIX of
`QuantizedTensor.tensors` or `InputTransform.tensors`; and LAYER.bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats import Format, QuantizedTensor, stored_shapes
from loraq.layers.entries import check_entries
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.transforms.input_transform import InputTransform

TensorsByPrefix = dict[str, dict[str, Tensor]]


def serialize_layers(
    layers: Mapping[str, LayerTensors],
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(entries, tensors) of packed layers by name."""
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    stored_as: dict[int, str] = {}
    for name, layer in layers.items():
        entry: dict[str, Any] = {
            "activation": dataclasses.asdict(layer.activation),
            "branch_activation": _format_entry(layer.branch_activation),
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


def deserialize_layers(
    entries: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, LayerTensors]:
    """The inverse of `serialize_layers`; LoraqError unless entries and tensors fit exactly."""
    _check_tensors(expected_tensors(entries), tensors)
    packed: dict[str, QuantizedTensor] = {}
    transforms: dict[str, InputTransform] = {}
    layers, by_prefix = {}, _by_prefix(tensors)
    for name, entry in entries.items():
        operands = {
            operand: _operand(entry[operand], by_prefix, packed)
            for operand in OPERANDS
            if operand in entry
        }
        width = operands["weight"].shape[-1]
        branch_activation = entry["branch_activation"]
        layers[name] = LayerTensors(
            weight=operands["weight"],
            left=operands.get("left"),
            right=operands.get("right"),
            activation=Format(**entry["activation"]),
            branch_activation=None if branch_activation is None else Format(**branch_activation),
            requantize_intermediate=entry["requantize_intermediate"],
            transform=_transform(entry["transform"], width, by_prefix, transforms),
            bias_O=tensors.get(f"{name}.bias"),
        )
    return layers


def expected_tensors(entries: Mapping[str, Any]) -> dict[str, Tensor]:
    """Every tensor that the entries name, on the meta device; LoraqError for a damaged entry."""
    check_entries(entries)
    expected: dict[str, Tensor] = {}

    def add(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        expected[name] = torch.empty(shape, dtype=dtype, device="meta")

    for name, entry in entries.items():
        for operand in OPERANDS:
            if operand in entry:
                packed = entry[operand]
                stored = stored_shapes(tuple(packed["shape"]), Format(**packed["format"]))
                for suffix, (shape, dtype) in stored.items():
                    add(f"{packed['tensors']}.{suffix}", shape, dtype)
        transform, width = entry["transform"], entry["weight"]["shape"][-1]
        if transform["smooth"]:
            add(f"{transform['tensors']}.smooth", (width,), torch.bfloat16)
        if transform["block"]:
            add(f"{transform['tensors']}.signs", (-(-width // 8),), torch.uint8)
        if entry["bias"]:
            add(f"{name}.bias", (entry["weight"]["shape"][0],), torch.float32)
    return expected


def _check_tensors(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    if wrong := sorted(set(expected) ^ set(tensors)):
        fault = "is missing" if wrong[0] in expected else "belongs to no layer"
        raise LoraqError(f"the tensor '{wrong[0]}' {fault}")
    for name, wanted in expected.items():
        found = tensors[name]
        if (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
            raise LoraqError(
                f"the tensor '{name}' is {tuple(found.shape)} of {found.dtype}, and its layer says "
                f"{tuple(wanted.shape)} of {wanted.dtype}"
            )


def _operand(
    entry: Mapping[str, Any], by_prefix: TensorsByPrefix, packed: dict[str, QuantizedTensor]
) -> QuantizedTensor:
    """The operand of an entry; one object for all entries with the same prefix."""
    prefix = entry["tensors"]
    if prefix not in packed:
        packed[prefix] = QuantizedTensor.from_tensors(
            by_prefix.get(prefix, {}), tuple(entry["shape"]), Format(**entry["format"])
        )
    return packed[prefix]


def _transform(
    entry: Mapping[str, Any],
    width: int,
    by_prefix: TensorsByPrefix,
    transforms: dict[str, InputTransform],
) -> InputTransform:
    """The transform of an entry; one object for all entries with the same prefix."""
    prefix = entry["tensors"]
    if prefix not in transforms:
        transforms[prefix] = InputTransform.from_tensors(
            by_prefix.get(prefix, {}), width, entry["block"], entry["shift"]
        )
    return transforms[prefix]


def _by_prefix(tensors: Mapping[str, Tensor]) -> TensorsByPrefix:
    """The tensors named PREFIX.SUFFIX: prefix -> suffix -> tensor."""
    found: TensorsByPrefix = {}
    for name, tensor in tensors.items():
        prefix, _, suffix = name.rpartition(".")
        found.setdefault(prefix, {})[suffix] = tensor
    return found


def _format_entry(fmt: Format | None) -> dict[str, Any] | None:
    return None if fmt is None else dataclasses.asdict(fmt)
