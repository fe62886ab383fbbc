"""What a layout of other programs must say of itself, and its look-up by name.

A target is a `Target` in a module of this package, which finds it by itself:

    TARGET = Target(name="…", …, refuse=refuse, losses=losses, write=write, read=read)
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from loraq.errors import unknown
from loraq.layers.linear import QuantizedLinear
from loraq.layers.tensors import LayerTensors
from loraq.layouts.engine_layer import EngineLayer


@dataclass(frozen=True)
class Source:
    """The packed network that is exported.

    network: one transformer, whose modules named in `layers` are `QuantizedLinear`s.
    dtype: 16-bit type of what the target stores besides codes.
    inputs: layer name → rows (T, I) of its raw input, in float32.
    captured: whether these rows come from images, of prompts that were given; else random.
    """

    network: nn.Module
    layers: Mapping[str, LayerTensors]
    dtype: torch.dtype
    inputs: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    captured: bool = False

    def packed(self, name: str) -> QuantizedLinear:
        """The module of a layer."""
        module = self.network.get_submodule(name)
        assert isinstance(module, QuantizedLinear)
        return module

    def convolution(self, name: str) -> bool:
        """Whether the layer is a 1×1 convolution."""
        return self.packed(name).convolution

    def other_tensors(self) -> dict[str, Tensor]:
        """The network's tensors that belong to no packed layer, by name."""
        packed = tuple(f"{name}." for name in self.layers)
        state = self.network.state_dict()
        return {name: t.contiguous() for name, t in state.items() if not name.startswith(packed)}


@dataclass(frozen=True)
class Contents:
    """What a file of a target holds: layers, and the tensors of what is not quantised, by name."""

    layers: dict[str, EngineLayer]
    others: dict[str, Tensor]


@dataclass(frozen=True)
class Target:
    """One layout.

    readers: the programs that read it. hardware: what these need.
    refuse(source, name): why this layer cannot be expressed, with the remedy; None if it can.
    losses(source): what is lost, in words, before anything is written.
    write(source, folder): writes the files into an empty folder, whose name changes afterwards.
    detect(folder): whether a folder or a file has this layout, from names and metadata alone.
    read(folder): strict; LoraqError names an unknown, missing, mis-shaped or mis-typed tensor.
    """

    name: str
    description: str
    readers: str
    hardware: str
    refuse: Callable[[Source, str], str | None]
    losses: Callable[[Source], Sequence[str]]
    write: Callable[[Source, Path], None]
    detect: Callable[[Path], bool]
    read: Callable[[Path], Contents]

    def __repr__(self) -> str:
        return f"Target({self.name}: {self.description})"


@cache
def targets() -> dict[str, Target]:
    """Every target by name, sorted."""
    package = importlib.import_module("loraq.layouts")
    modules = (
        importlib.import_module(f"loraq.layouts.{item.name}")
        for item in pkgutil.iter_modules(package.__path__)
    )
    held = (value for module in modules for value in vars(module).values())
    return {t.name: t for t in sorted({v for v in held if isinstance(v, Target)}, key=_name)}


def find_target(name: str) -> Target:
    """The target of this name; LoraqError with near matches for an unknown one."""
    if name not in targets():
        raise unknown("layout to export to", name, targets())
    return targets()[name]


def list_targets() -> str:
    """One paragraph a target: what it is, what reads it and on which hardware."""
    return "\n".join(
        f"{t.name}: {t.description}\n  read by: {t.readers}\n  hardware: {t.hardware}"
        for t in targets().values()
    )


def _name(target: Target) -> str:
    return target.name
