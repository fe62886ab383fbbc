"""The layers of a denoiser to quantise, and their roles."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraq.errors import LoraqError, did_you_mean, near_matches
from loraq.models.family import (
    GENERIC,
    Family,
    family_for,
    family_names,
    find_family,
    recipe_for,
)
from loraq.models.family_file import check_names, is_family_file
from loraq.models.plain_layers import check_layers, check_transformer

if TYPE_CHECKING:
    from torch import nn

    from loraq.models.discovery.structure import Found

__all__ = [
    "Family",
    "Layer",
    "family_names",
    "family_of",
    "find_family",
    "list_layers",
    "recipe_for",
]


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


def family_of(denoiser: nn.Module, given: str | None = None) -> str:
    """The model family of a transformer, or of experts, by its class: `given`, or `generic`.

    LoraqError if `given` is the family of other classes.
    """
    from loraq.models.denoisers import parts

    check_transformer(denoiser)
    network = next(iter(parts(denoiser).values()))
    bases = [base.__name__ for base in type(network).__mro__]
    own = next((name for base in bases if (name := family_for(base)) != GENERIC), GENERIC)
    if given is None:
        return own
    of_others = {*find_family(given).TRANSFORMERS}.isdisjoint(bases)
    if own != GENERIC and find_family(given).TRANSFORMERS and of_others:
        raise LoraqError(
            f"family={given}: {type(network).__name__} is the transformer of family '{own}'. "
            "Leave family= out."
        )
    return given


def list_layers(
    denoiser: nn.Module, family_name: str, skip: Sequence[str] | None = None
) -> list[Layer]:
    """The layers to quantise, in model order.

    denoiser: a transformer, or `Experts`, whose layers' names begin with their component.
    skip: roles or globs on layer names (None: the family's list, or the rule of
        `discovery/structure.py`). LoraqError for an entry that matches no layer, if no layer
        remains, and for a layer that is not a plain linear layer or 1×1 convolution
        (`plain_layers.py`).
    """
    check_transformer(denoiser)
    family = find_family(family_name)
    listed = list(_candidates(denoiser, family))
    if not listed:
        raise LoraqError(
            f"{type(denoiser).__name__} has no repeated blocks with linear layers, so nothing of "
            "it can be quantised. Use a diffusion transformer."
        )
    if is_family_file(family_name):
        check_names(family_name, [_starred(layer, found) for layer, found in listed])
    skip = family.DEFAULT_SKIP if skip is None else skip
    layers = [layer for layer, _ in listed]
    if skip is None:
        kept = [layer for layer, found in listed if not found.reason]
    else:
        dropped = _matching(layers, skip)
        kept = [layer for layer in layers if layer.name not in dropped]
    if not kept:
        where = f", or from {family_name}" if is_family_file(family_name) else ""
        raise LoraqError(f"quant.skip leaves no layer to quantise. Remove an entry from it{where}.")
    check_layers(denoiser, [layer.name for layer in kept])
    return kept


def _starred(layer: Layer, found: Found) -> str:
    """The layer's name with a star for the number of its block."""
    return layer.name.replace(f"{found.block}.", f"{found.block.rpartition('.')[0]}.*.", 1)


def _candidates(denoiser: nn.Module, family: Family) -> Iterator[tuple[Layer, Found]]:
    """The layers of the denoiser that can be quantised, with what was found of each.

    LoraqError for one that is missing or quantised already.
    """
    from loraq.models.denoisers import joined, parts
    from loraq.models.discovery.structure import structure_of

    for part, network in parts(denoiser).items():
        modules = dict(network.named_modules(remove_duplicate=False))
        for found in structure_of(network, family).layers:
            if not found.quantizable:
                continue
            name = joined(part, found.name)
            if found.name not in modules:
                raise LoraqError(
                    f"Block '{found.block}' has no layer with the role {found.role}, which its "
                    "configuration gives it. Load the complete 16-bit model without wrappers."
                )
            weight = getattr(modules[found.name], "weight", None)
            if weight is None:
                kind = type(modules[found.name]).__name__
                raise LoraqError(
                    f"'{name}' is quantised already ({kind}). Restore the 16-bit layers with "
                    "`.revert(transformer)`, or load the 16-bit model."
                )
            out_features, in_features = weight.shape[:2]
            shape = (int(out_features), int(in_features))
            yield (
                Layer(name, found.role, shape, joined(part, found.input_id), found.after_gelu),
                found,
            )


def _matching(layers: Sequence[Layer], skip: Sequence[str]) -> set[str]:
    """Names of the layers that a skip list names; LoraqError for an entry that names none."""
    dropped: set[str] = set()
    for pattern in skip:
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
    return dropped
