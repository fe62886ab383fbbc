"""The hash by which a resumed quantisation recognises its finished groups."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from loraq.config import Recipe
from loraq.models.pointwise import finite_weight
from loraq.quantization.activations import Activations
from loraq.quantization.grouping import Group, UnitAllocation

VERSION = 1
"""Part of every quantised product's key; increased when the results of every method change."""

BRANCH_VERSIONS = {("alternating", "output"): 2, ("alternating", "weight"): 4}
"""(branch.kind, branch.select) → a version for these branches alone; none if not listed."""


LAYOUT = "2"
"""The start of every fingerprint; increased when the same groups get other fingerprints."""
PIECE = 16 << 20
"""Bytes that are copied to the host at a time."""


def group_fingerprint(
    group: Group, transformer: nn.Module, recipe: Recipe, activations: Activations
) -> str:
    """Everything that determines a group's packed layers, as LAYOUT:settings:contents.

    Two sha256: of `fingerprint_text`, and of layer names, weights, biases, and the activations that
    were read, as the bytes of their own dtypes.
    """
    settings = hashlib.sha256(fingerprint_text(recipe, group.allocation).encode()).hexdigest()
    digest = hashlib.sha256()

    def add(tensor: Tensor) -> None:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
        for piece in tensor.detach().contiguous().flatten().view(torch.uint8).split(PIECE):
            digest.update(piece.cpu().numpy())

    for unit in group.units:
        for layer in unit.layers:
            digest.update(layer.name.encode())
            module = transformer.get_submodule(layer.name)
            add(finite_weight(transformer, layer.name))
            if module.bias is not None:
                add(module.bias.detach())
        if activations.rows is not None:
            add(activations.rows[unit.input_id])
        if activations.moments is not None:
            moment = activations.moments.get(unit.input_id)
            if moment is not None:
                add(moment.second_II)
                add(moment.mean_I)
    return f"{LAYOUT}:{settings}:{digest.hexdigest()}"


def same_settings(one: str, other: str) -> bool:
    """Whether two fingerprints differ in layers, weights or activations at most."""
    return one.rpartition(":")[0] == other.rpartition(":")[0]


def fingerprint_text(recipe: Recipe, allocation: UnitAllocation) -> str:
    """The settings part of a fingerprint: code versions, the recipe, the group's allocation.

    The allocation is spelled out, not `repr`, so that renaming the class keeps finished groups
    valid.
    """
    versions = VERSION, BRANCH_VERSIONS.get((recipe.branch.kind, recipe.branch.select))
    allocated = f"Share(rank={allocation.rank}, weight_bits={allocation.weight_bits})"
    return f"({versions!r}, {recipe.identity()!r}, {allocated})"
