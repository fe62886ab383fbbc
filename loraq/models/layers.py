"""The layers of a transformer by role: a family module's table applied to its module names."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING

from loraq.config import Recipe
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown
from loraq.models import families

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layer:
    """One linear or 1×1 convolution: its name, what it does, (out, in), whose input it shares.

    Layers with equal `shares_input` read the very same tensor ("transformer_blocks.0.attn1.qkv").
    `after_gelu`: it reads a GELU's output, which −0.17 bounds below.
    """

    name: str
    role: str
    shape: tuple[int, int]
    shares_input: str
    after_gelu: bool = False


def family_names() -> list[str]:
    """The model families there are: the modules of `loraq/models/families/`."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def family(name: str) -> ModuleType:
    """The family module of that name."""
    if name not in family_names():
        raise unknown("model family", name, family_names())
    return importlib.import_module(f"{families.__name__}.{name}")


def with_default_skip(recipe: Recipe, family_name: str) -> Recipe:
    """The recipe with the family's own list of skipped layers where it has none itself."""
    if recipe.skip is not None:
        return recipe
    return replace(recipe, skip=tuple(family(family_name).DEFAULT_SKIP))


def family_of(transformer: torch.nn.Module) -> str:
    """The family whose transformer class this is; LoraqError where there is none."""
    classes = {family(name).TRANSFORMER: name for name in family_names()}
    name = type(transformer).__name__
    if name not in classes:
        raise LoraqError(
            f"No model family is known for {name}. Known: {', '.join(classes)}. Pass family=…, or "
            "add one file to loraq/models/families/ (CONTRIBUTING.md)."
        )
    return classes[name]


def list_layers(
    transformer: torch.nn.Module, family_name: str, skip: Sequence[str] | None = None
) -> list[Layer]:
    """The layers to quantise, in the order of the model.

    `skip` names roles or globs on layer names (None: the family's own list); an entry that
    matches no layer raises, so that a misspelt one cannot pass in silence.
    """
    table = family(family_name)
    layers = []
    for name, module in transformer.named_modules():
        for pattern, role, group in table.ROLES:
            if re.fullmatch(pattern, name):
                if not hasattr(module, "weight"):
                    raise LoraqError(
                        f"'{name}' is quantised already ({type(module).__name__}). Put the 16-bit "
                        "layers back with `.revert(transformer)`, or load the 16-bit model."
                    )
                out_features, in_features = module.weight.shape[:2]
                block = ".".join(name.split(".")[:2])
                shape = (int(out_features), int(in_features))
                after_gelu = role in table.AFTER_GELU
                layers.append(Layer(name, role, shape, f"{block}.{group}", after_gelu))
    if not layers:
        raise LoraqError(
            f"No layer of {type(transformer).__name__} matches the roles of family "
            f"'{family_name}'. Set model.family to one of {', '.join(family_names())}."
        )
    dropped: set[str] = set()
    for pattern in table.DEFAULT_SKIP if skip is None else skip:
        matched = {
            layer.name
            for layer in layers
            if layer.role == pattern or fnmatch.fnmatchcase(layer.name, pattern)
        }
        if not matched:
            roles = list(dict.fromkeys(layer.role for layer in layers))
            names = [layer.name for layer in layers]
            guess = did_you_mean(near_matches(pattern, roles + names))
            raise LoraqError(
                f"quant.skip: '{pattern}' matches none of {len(layers)} layers.{guess}"
                f"\n  Roles: {', '.join(roles)}; or a glob on names such as '{names[0]}'."
            )
        dropped |= matched
    kept = [layer for layer in layers if layer.name not in dropped]
    if not kept:
        raise LoraqError("quant.skip leaves no layer to quantise. Take an entry out of it.")
    return kept
