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

from loraq.errors import LoraqError, did_you_mean, near_matches, unknown

if TYPE_CHECKING:
    import torch

    from loraq.config import Recipe

_NO_FAMILY = ("analytic", "families", "loading", "mapped", "pointwise")

# A family's ROLES: (pattern of a layer's name below the transformer, role, input group relative to
# the block). Layers with the same input group read the very same tensor.
ATTENTION_ROLES = (
    (r"transformer_blocks\.\d+\.attn1\.to_q", "self_q", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_k", "self_k", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_v", "self_v", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_out\.0", "self_out", "attn1.out"),
    (r"transformer_blocks\.\d+\.attn2\.to_q", "cross_q", "attn2.q"),
    (r"transformer_blocks\.\d+\.attn2\.to_k", "cross_k", "attn2.kv"),
    (r"transformer_blocks\.\d+\.attn2\.to_v", "cross_v", "attn2.kv"),
    (r"transformer_blocks\.\d+\.attn2\.to_out\.0", "cross_out", "attn2.out"),
)
"""The rows of `ROLES` for diffusers' self-attention `attn1` and cross-attention `attn2`."""


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
    """The families there are: the modules of this package that hold a table of roles."""
    package = importlib.import_module("loraq.models")
    names = [module.name for module in pkgutil.iter_modules(package.__path__)]
    return sorted(name for name in names if name not in _NO_FAMILY)


def family(name: str) -> ModuleType:
    """The family module of that name."""
    if name not in family_names():
        raise unknown("model family", name, family_names())
    return importlib.import_module(f"loraq.models.{name}")


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
            "add one file to loraq/models/ (CONTRIBUTING.md)."
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
