"""The layers of a transformer and their roles, by the table of its model family."""

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
from loraq.models.plain_layers import check_layers, check_transformer

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Layer:
    """A linear layer or 1×1 convolution: name, role, shape (out, in), input id.

    Layers with equal `shares_input` read the same tensor ("transformer_blocks.0.attn1.qkv").
    `after_gelu`: its input is the output of a GELU, which is ≥ −0.17.
    """

    name: str
    role: str
    shape: tuple[int, int]
    shares_input: str
    after_gelu: bool = False


def family_names() -> list[str]:
    """The names of the model families: the modules of `loraq/models/families/`."""
    return sorted(module.name for module in pkgutil.iter_modules(families.__path__))


def find_family(name: str) -> ModuleType:
    """The module of a model family; LoraqError with near matches for an unknown name."""
    if name not in family_names():
        raise unknown("model family", name, family_names())
    return importlib.import_module(f"{families.__name__}.{name}")


def recipe_for(recipe: Recipe, family_name: str, dtype: str | torch.dtype) -> Recipe:
    """The recipe with what it leaves to the model: the skipped layers, the type in 16 bits."""
    recipe = recipe.for_model(str(dtype).removeprefix("torch."))
    if recipe.skip is not None:
        return recipe
    return replace(recipe, skip=tuple(find_family(family_name).DEFAULT_SKIP))


def family_of(transformer: torch.nn.Module, given: str | None = None) -> str:
    """The model family of a transformer by its class; `given` for a class of no family.

    LoraqError for an unknown class without `given`, and if `given` is not the family of the class.
    """
    check_transformer(transformer)
    classes = {find_family(name).TRANSFORMER: name for name in family_names()}
    name = type(transformer).__name__
    bases = (base.__name__ for base in type(transformer).__mro__)
    own = next((classes[base] for base in bases if base in classes), None)
    if given is not None:
        find_family(given)
    if own is None and given is None:
        raise LoraqError(
            f"No model family has the transformer {name}. Known: {', '.join(classes)}. Pass "
            "family=…, or add a file to loraq/models/families/ (CONTRIBUTING.md)."
        )
    if own is not None and given not in (None, own):
        raise LoraqError(
            f"family={given}: {name} is the transformer of family '{own}'. Leave family= out."
        )
    return own or str(given)


def list_layers(
    transformer: torch.nn.Module, family_name: str, skip: Sequence[str] | None = None
) -> list[Layer]:
    """The layers to quantise, in model order.

    skip: roles or globs on layer names (None: the family's list). LoraqError for an entry that
        matches no layer, if no layer remains, and for a layer that is not a plain linear layer or
        1×1 convolution (`plain_layers.py`).
    """
    check_transformer(transformer)
    table = find_family(family_name)
    layers = []
    for name, module in transformer.named_modules(remove_duplicate=False):
        for pattern, role, group in table.ROLES:
            if re.fullmatch(pattern, name):
                if not hasattr(module, "weight"):
                    raise LoraqError(
                        f"'{name}' is quantised already ({type(module).__name__}). Restore the "
                        "16-bit layers with `.revert(transformer)`, or load the 16-bit model."
                    )
                out_features, in_features = module.weight.shape[:2]
                shape = (int(out_features), int(in_features))
                after_gelu = role in table.AFTER_GELU
                layers.append(Layer(name, role, shape, f"{_block(name)}.{group}", after_gelu))
    if not layers:
        raise LoraqError(
            f"No layer of {type(transformer).__name__} matches the roles of family "
            f"'{family_name}'. Set model.family to one of {', '.join(family_names())}."
        )
    _check_blocks(layers)
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
        raise LoraqError("quant.skip leaves no layer to quantise. Remove an entry from it.")
    check_layers(transformer, [layer.name for layer in kept])
    return kept


def _block(name: str) -> str:
    """The block of a layer: 'transformer_blocks.3'."""
    return ".".join(name.split(".")[:2])


def _check_blocks(layers: Sequence[Layer]) -> None:
    """LoraqError if a block lacks a layer that other blocks have: a wrapper may hide it."""
    roles = {layer.role: None for layer in layers}
    blocks: dict[str, set[str]] = {}
    for layer in layers:
        blocks.setdefault(_block(layer.name), set()).add(layer.role)
    for block, found in blocks.items():
        missing = [role for role in roles if role not in found]
        if missing:
            raise LoraqError(
                f"Block '{block}' has no layer with the role {', '.join(missing)}, which other "
                "blocks have. Load the complete 16-bit model without wrappers."
            )
