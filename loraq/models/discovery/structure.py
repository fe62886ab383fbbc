"""The layers of a transformer: what they are, which read one tensor, which stay in 16 bits and why.

Quantised are the linear layers and 1×1 convolutions of the repeated blocks (`nn.ModuleList`s with
attention), except what the rule of `_reason` leaves in 16 bits. Roles follow from names
(`roles.py`); shared inputs, self- or cross-attention, layers behind a GELU and layers that are not
used follow from one forward without weights (`traced.py`), or from names where it fails.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from loraq.models.discovery.roles import CROSS_INPUTS, EMBEDDING, role_of
from loraq.models.discovery.traced import Trace, trace
from loraq.models.family import Family

SMALLEST = 16
"""Widths below this are not quantised."""
OUTSIDE = "outside the blocks"
SPATIAL = "a spatial or grouped convolution"
UNUSED = "not used by the forward"
EMBEDS = "embedding"
MODULATES = "modulation"
CROSS = "cross-attention keys and values"
SMALL = f"fewer than {SMALLEST} channels"


@dataclass(frozen=True)
class Found:
    """A linear layer or convolution of a transformer.

    block: "" outside the blocks. shape: (out, in). input_id: equal for layers of one block that
    read the same tensor. reason: why the layer stays in 16 bits by rule; "" if it is quantised.
    """

    name: str
    block: str
    role: str
    shape: tuple[int, int]
    input_id: str
    after_gelu: bool
    reason: str

    @property
    def inside(self) -> str:
        """The name inside the block."""
        return self.name.removeprefix(f"{self.block}.") if self.block else self.name

    @property
    def quantizable(self) -> bool:
        """Whether a skip list that does not name the layer can have it quantised."""
        return self.reason not in (OUTSIDE, SPATIAL, UNUSED)


@dataclass(frozen=True)
class Structure:
    """All layers in model order; layout: of example latents; untraced: why there was no trace."""

    layers: tuple[Found, ...]
    layout: str
    untraced: str = ""


def structure_of(transformer: nn.Module, family: Family) -> Structure:
    """The structure of a transformer's class and configuration, whatever became of its modules.

    That of the modules themselves for a network that has no configuration.
    """
    config = getattr(transformer, "config", None)
    if config is None or not hasattr(type(transformer), "from_config"):
        return _structure(transformer, family, Trace(failure="it has no configuration"))
    return structure_of_class(type(transformer), dict(config), family)


def structure_of_class(kind: type, config: dict[str, Any], family: Family) -> Structure:
    """The structure of a class with a configuration; cached."""
    text = json.dumps(config, default=str, sort_keys=True)
    return _of_class(_Class(kind, text, config), family)


class _Class:
    """A class and its configuration, as the key of a cache."""

    def __init__(self, kind: type, text: str, config: dict[str, Any]) -> None:
        self.kind, self.config, self._key = kind, config, (kind, text)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Class) and self._key == other._key


@functools.lru_cache(maxsize=32)
def _of_class(asked: _Class, family: Family) -> Structure:
    network, found = trace(asked.kind, asked.config, family)
    return _structure(network, family, found)


def _structure(network: nn.Module, family: Family, found: Trace) -> Structure:
    blocks = block_lists(network)
    layers = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            out_features, in_features = module.weight.shape[:2]
            layers.append(
                Found(
                    name,
                    _block_of(name, blocks),
                    "",
                    (int(out_features), int(in_features)),
                    "",
                    all(call.after_gelu for call in found.calls.get(name, []))
                    and name in found.calls,
                    "" if _is_linear(module) else SPATIAL,
                )
            )
    by_block: dict[str, list[Found]] = {}
    for layer in layers:
        by_block.setdefault(layer.block, []).append(layer)
    outside = [
        replace(layer, role=layer.name, input_id=layer.name, reason=OUTSIDE)
        for layer in by_block.pop("", [])
    ]
    roles = _roles(by_block.values(), family, found)
    made = {layer.name: layer for layer in outside}
    for members in by_block.values():
        made |= {layer.name: layer for layer in _block_layers(members, roles, found)}
    return Structure(tuple(made[layer.name] for layer in layers), found.layout, found.failure)


def block_lists(network: nn.Module) -> list[str]:
    """The names of the lists of repeated blocks: outermost, with attention if any list has it."""
    lists: list[tuple[str, bool]] = []
    for name, module in network.named_modules():
        if not isinstance(module, nn.ModuleList) or any(
            name.startswith(f"{outer}.") for outer, _ in lists
        ):
            continue
        if len(module) and all(_is_composite(member) for member in module):
            inner = (type(part).__name__ for part in module[0].modules())
            lists.append((name, any(re.search("attention|attn|mha", n, re.I) for n in inner)))
    attentive = [name for name, attends in lists if attends and not EMBEDDING.search(name)]
    return attentive or [name for name, _ in lists]


def _is_composite(module: nn.Module) -> bool:
    """Whether a module holds linear layers and is none itself."""
    return not isinstance(module, nn.Linear) and any(
        isinstance(part, nn.Linear) for part in module.modules()
    )


def _block_of(name: str, lists: Sequence[str]) -> str:
    for listed in lists:
        if found := re.match(rf"{re.escape(listed)}\.\d+(?=\.)", name):
            return found[0]
    return ""


def _is_linear(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        ones = (1, 1)
        return module.kernel_size == module.stride == ones and module.groups == 1
    return True


def _kind(layer: Found) -> tuple[str, str]:
    """The layer's list of blocks, and its name inside the block: equal for repeated layers."""
    return layer.block.rpartition(".")[0], layer.inside


def _roles(
    blocks: Sequence[Sequence[Found]] | Any, family: Family, found: Trace
) -> dict[tuple[str, str], tuple[str, str]]:
    """(Role, usual role) by list of blocks and name inside.

    Roles are distinct in a list: a second layer of one usual role has its name as role.
    """
    members: dict[str, dict[str, list[Found]]] = {}
    for layers in blocks:
        for layer in layers:
            listed, inside = _kind(layer)
            members.setdefault(listed, {}).setdefault(inside, []).append(layer)
    roles: dict[tuple[str, str], tuple[str, str]] = {}
    for listed, names in members.items():
        taken: set[str] = set()
        for inside in names:
            starred = f"{listed}.*.{inside}"
            given = (
                role
                for pattern, role in family.ROLES
                if re.fullmatch(pattern, inside) or re.fullmatch(pattern, starred)
            )
            usual = next(given, None) or role_of(inside, names)
            if usual.startswith("cross_") and _attends_itself(inside, names, found):
                usual = usual.replace("cross_", "self_", 1)
            role = re.sub(r"\W+", "_", inside).lower() if usual in taken else usual
            taken.add(role)
            roles[listed, inside] = role, usual
    return roles


def _attends_itself(inside: str, names: Mapping[str, Sequence[Found]], found: Trace) -> bool:
    """Whether queries and keys of the layer's attention read the same tensor."""
    where = inside.removesuffix(".0").rpartition(".")[0]
    parts = {
        role_of(other, names): names[other][0].name
        for other in names
        if other.removesuffix(".0").rpartition(".")[0] == where
    }
    inputs = [found.input_of(parts.get(f"cross_{part}", "")) for part in "qk"]
    return inputs[0] is not None and inputs[0] == inputs[1]


def _block_layers(
    members: Sequence[Found], roles: Mapping[tuple[str, str], tuple[str, str]], found: Trace
) -> Iterator[Found]:
    """The layers of one block with their roles, inputs and reasons."""
    called = {starred_name(name) for name in found.calls}
    named = [replace(layer, role=roles[_kind(layer)][0]) for layer in members]
    groups: dict[object, list[Found]] = {}
    for layer in named:
        groups.setdefault(_input_key(layer, found), []).append(layer)
    ids: set[str] = set()
    for group in groups.values():
        short = _input_name(group)
        if short in ids:
            short = group[0].inside
        ids.add(short)
        for layer in group:
            used = bool(found.failure) or starred_name(layer.name) in called
            usual = roles[_kind(layer)][1]
            reason = layer.reason or (_reason(layer, usual) if used else UNUSED)
            yield replace(layer, input_id=f"{layer.block}.{short}", reason=reason)


def starred_name(name: str) -> str:
    """The name with stars for numbers inside its block.

    Layers of equal names are experts of one block: which of them is called depends on values.
    """
    block = re.match(r".*?\.\d+(?=\.)", name)
    inside = block.end() if block else 0
    return name[:inside] + re.sub(r"(?<=\.)\d+(?=\.)", "*", name[inside:])


def _input_key(layer: Found, found: Trace) -> object:
    read = found.input_of(layer.name)
    if read is not None:
        return read
    where, role = layer.inside.rpartition(".")[0], layer.role
    if found.failure and re.fullmatch(r"(self|context)_[qkv]", role):
        return where, role.rpartition("_")[0]
    if found.failure and re.fullmatch(r"\w*cross_[kv]", role):
        return where, "kv"
    if found.failure and re.fullmatch(r"\w*ff_(up|gate)", role):
        return where, "up"
    return layer.name


def _input_name(group: Sequence[Found]) -> str:
    """A short name made from the layers: attn1.qkv, attn2.kv, ff.up."""
    containers = (layer.inside.partition(".") for layer in group)
    where = next((first for first, dot, _ in containers if dot), "")
    parts = [layer.role.rpartition("_")[2] for layer in group]
    letters = "".join(part for part in parts if len(part) == 1)
    words = [part for part in dict.fromkeys(parts) if len(part) > 1]
    short = "_".join([letters, *words] if letters else words)
    return f"{where}.{short}" if where else short


def _reason(layer: Found, usual: str) -> str:
    """Why the rule leaves a layer of a usual role in 16 bits; "" if it does not."""
    if usual.endswith("modulation"):
        return MODULATES
    if EMBEDDING.search(layer.inside):
        return EMBEDS
    if CROSS_INPUTS.fullmatch(usual):
        return CROSS
    return SMALL if min(layer.shape) < SMALLEST else ""
