"""The groups of a model and what quantising them reads; which of them are finished."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.layers.tensors import LayerTensors
from loraq.models.family import find_family
from loraq.models.known_inputs import known_inputs
from loraq.models.layers import Layer, family_of
from loraq.models.moments import Moment
from loraq.models.pointwise import finite_weight
from loraq.quantization.activations import Activations
from loraq.quantization.allocation.allocate import allocate_units
from loraq.quantization.budget import choose_rank
from loraq.quantization.fingerprint import LAYOUT, group_fingerprint, same_settings
from loraq.quantization.group_file import keep_group, load_group
from loraq.quantization.grouping import (
    Group,
    Unit,
    UnitAllocation,
    group_elements,
    make_groups,
    make_units,
)
from loraq.quantization.solve import quantize_group
from loraq.utils.lazy_mapping import LazyMapping

if TYPE_CHECKING:
    from tqdm import tqdm

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GroupWork:
    """The groups of a model, and what quantising one of them reads."""

    transformer: nn.Module
    recipe: Recipe
    read: Activations
    groups: Sequence[Group]

    @classmethod
    def of(
        cls,
        transformer: nn.Module,
        layers: Sequence[Layer],
        recipe: Recipe,
        activations: Activations | None,
        family: str | None,
    ) -> GroupWork:
        """The groups of `layers`, in the order of the model; raises as `quantize_model` does."""
        read = (activations or Activations()).restricted_to(recipe)
        read.check_read(layers)
        if recipe.statistics == "weights":
            read = replace(read, moments=_known_moments(transformer, layers, family))
        units = make_units(layers, recipe.branch.share_qkv)
        allocations = _allocations(units, transformer, recipe, read)
        elements = group_elements(next(transformer.parameters()).device)
        return cls(transformer, recipe, read, make_groups(units, allocations, elements, read.rows))

    def __repr__(self) -> str:
        return f"GroupWork({len(self.groups)} groups)"

    def bar(self, progress: str | None) -> tqdm[NoReturn]:
        """A progress bar of the weights of all groups."""
        from tqdm import tqdm

        return tqdm(
            total=sum(group.weights for group in self.groups),
            desc=progress,
            unit=" weights",
            unit_scale=True,
            smoothing=0,  # average speed, because layer kinds of different speed alternate
            disable=progress is None,
        )

    def quantize(self, group: Group) -> tuple[dict[str, LayerTensors], dict[str, Any]]:
        """The group's packed layers, and notes with the seconds that they took."""
        started = time.perf_counter()
        try:
            tensors, notes = quantize_group(group, self.transformer, self.recipe, self.read)
        except LoraqError as error:
            names = ", ".join(unit.name for unit in group.units)
            raise LoraqError(f"{error}\n  (in {names})") from error
        return tensors, notes | {"seconds": time.perf_counter() - started}

    def fingerprint(self, group: Group) -> str:
        """What determines the group's packed layers (`group_fingerprint`)."""
        return group_fingerprint(group, self.transformer, self.recipe, self.read)

    def is_finished(self, group: Group, path: Path) -> bool:
        """Whether `path` contains the group; LoraqError if it contains another's.

        False if it is damaged, from an earlier version, or of other layers because an earlier run
        had more or less memory.
        """
        if not keep_group(path):
            return False
        try:
            layers, notes = load_group(path)
        except LoraqError:
            if path.parent.is_dir():
                raise
            return True  # another process has finished the product
        held, fingerprint = str(notes.get("fingerprint")), self.fingerprint(group)
        if held == fingerprint:
            return True
        names = {layer.name for unit in group.units for layer in unit.layers}
        regrouped = same_settings(held, fingerprint) and layers.keys() != names
        if regrouped or held.partition(":")[0] != LAYOUT:
            log.warning("'%s' was grouped by another version or device; it is made again.", path)
            return False
        raise LoraqError(
            f"'{path}' contains layers of another recipe, model or calibration. Use a separate "
            f"checkpoint_dir for each, or empty '{path.parent}'."
        )


def _known_moments(
    transformer: nn.Module, layers: Sequence[Layer], family_name: str | None
) -> Mapping[str, Moment]:
    """Moments of the layer inputs that the weights determine, by input id; LoraqError for none."""
    family = find_family(family_name or family_of(transformer))
    own = family.known_inputs
    known = known_inputs(transformer, family) if own is None else own(transformer)
    if not known:
        raise LoraqError(
            f"quant.statistics=weights: the weights of {type(transformer).__name__} determine none "
            "of its layers' inputs. Use quant.statistics=activations, which reads calibration "
            "activations."
        )
    without = [layer.role for layer in layers if layer.shares_input not in known]
    if without:
        log.info(
            "The weights tell nothing about the inputs of %d of %d layers (%s): these get no "
            "smoothing, no weighting and nearest rounding.",
            len(without),
            len(layers),
            ", ".join(dict.fromkeys(without)),
        )
    return known


def _allocations(
    units: Sequence[Unit], transformer: nn.Module, recipe: Recipe, read: Activations
) -> dict[str, UnitAllocation]:
    """Rank and bits of each unit: one rank for all, or allocated within the same memory."""
    rank = choose_rank(units, recipe)
    names = [layer.name for unit in units for layer in unit.layers]
    weights = LazyMapping(names, lambda name: finite_weight(transformer, name))
    return allocate_units(units, weights, recipe, rank, read.sensitivity)
