"""The hash by which an interrupted quantisation knows its finished groups again."""

from __future__ import annotations

import hashlib

from torch import Tensor, nn

from loraq.config import Recipe
from loraq.models.pointwise import weight_matrix
from loraq.quantization.activations import Activations
from loraq.quantization.grouping import Group, Share

VERSION = 1
"""Part of every quantised product's key; raised when the numbers of every method change."""

BRANCH_VERSIONS = {("alternating", "output"): 2, ("alternating", "weight"): 4}
"""The same for one kind of branch and what it selects by; what is not listed has none."""


def fingerprint(
    group: Group, transformer: nn.Module, recipe: Recipe, activations: Activations
) -> str:
    """sha256 of all that a group's packed layers follow from: recipe, weights, activations read."""
    digest = hashlib.sha256(fingerprint_text(recipe, group.share).encode())

    def add(tensor: Tensor) -> None:
        digest.update(tensor.float().contiguous().cpu().numpy().tobytes())

    for unit in group.units:
        for layer in unit.layers:
            digest.update(layer.name.encode())
            module = transformer.get_submodule(layer.name)
            add(weight_matrix(module))
            if module.bias is not None:
                add(module.bias.detach())
        if activations.rows is not None:
            add(activations.rows[unit.input_id])
        if activations.moments is not None:
            moment = activations.moments.get(unit.input_id)
            if moment is not None:
                add(moment.second_II)
                add(moment.mean_I)
    return digest.hexdigest()


def fingerprint_text(recipe: Recipe, share: Share) -> str:
    """What a fingerprint holds of the settings: code versions, the recipe, the group's share.

    Written out, so that renaming a class leaves it as it is.
    """
    made_by = VERSION, BRANCH_VERSIONS.get((recipe.branch.kind, recipe.branch.select))
    given = f"Share(rank={share.rank}, weight_bits={share.weight_bits})"
    return f"({made_by!r}, {recipe.identity()!r}, {given})"
