"""Quantise the layers of a transformer group by group, and save each finished group."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.layers.tensors import LayerTensors
from loraq.models.layers import Layer
from loraq.models.layers import find_family as family_table
from loraq.models.moments import Moment
from loraq.models.pointwise import finite_weight
from loraq.quantization.activations import Activations
from loraq.quantization.allocation.allocate import allocate_units
from loraq.quantization.budget import choose_rank
from loraq.quantization.fingerprint import LAYOUT, group_fingerprint, same_settings
from loraq.quantization.group_file import keep_group, load_group, remove_regrouped, save_group
from loraq.quantization.grouping import (
    Group,
    Unit,
    UnitAllocation,
    group_elements,
    make_groups,
    make_units,
)
from loraq.quantization.made_from import weight_sample
from loraq.quantization.model import QuantizedModel
from loraq.quantization.solve import quantize_group
from loraq.utils.files import ABANDONED, remove_temporaries
from loraq.utils.lazy_mapping import LazyMapping
from loraq.utils.memory import reused_heap

log = logging.getLogger(__name__)


def quantize_model(
    transformer: nn.Module,
    layers: Sequence[Layer],
    recipe: Recipe,
    activations: Activations | None = None,
    checkpoint_dir: Path | None = None,
    progress: str | None = "quantise",
    family: str | None = None,
    release: Callable[[], None] | None = None,
) -> QuantizedModel:
    """Quantise `layers` of `transformer` with `recipe`; does not change the transformer.

    activations: of the 16-bit model, for calibrated recipes; data-free recipes do not read them.
    checkpoint_dir: every finished group is saved here, and a later call resumes from it.
    progress: label of the progress bar; None disables it.
    family: the model's family, which `statistics=weights` reads the inputs' moments from.
    release: called after every group to unmap the 16-bit weights it read; with a checkpoint_dir,
        finished layers are then memory-mapped from their files too.

    Raises LoraqError if the recipe's activations are missing, or if checkpoint_dir contains groups
    of another recipe, model or calibration.
    """
    from tqdm import tqdm

    if checkpoint_dir is not None:
        remove_temporaries(checkpoint_dir, ABANDONED)
    read = (activations or Activations()).restricted_to(recipe)
    if recipe.statistics == "weights":
        read = replace(read, moments=_known_moments(transformer, family))
    units = make_units(layers, recipe.branch.share_qkv)
    allocations = _allocations(units, transformer, recipe, read)
    groups = make_groups(units, allocations, group_elements(_device(transformer)))
    done: dict[str, LayerTensors] = {}
    info: dict[str, Any] = {}
    bar = tqdm(
        total=sum(unit.weights for unit in units),
        desc=progress,
        unit=" weights",
        unit_scale=True,
        smoothing=0,  # average speed, because layer kinds of different speed alternate
        disable=progress is None,
    )
    with bar, reused_heap() as trim:
        for group in groups:
            tensors, notes, resumed = _quantize_or_resume(
                group, transformer, recipe, read, checkpoint_dir
            )
            if release is not None:
                release()
                if checkpoint_dir is not None:
                    tensors, _ = load_group(checkpoint_dir / group.file)
            done.update(tensors)
            info[group.name] = notes
            trim()
            error = f" error {notes['losses'][-1]:.4f}" if notes["losses"] else ""
            bar.set_postfix_str(group.name + error, refresh=False)
            if resumed and not bar.disable:  # keep resumed groups out of the estimated speed
                bar.initial, bar.n = bar.initial + group.weights, bar.n + group.weights
                bar.refresh()
            else:
                bar.update(group.weights)
    if checkpoint_dir is not None:
        remove_regrouped(checkpoint_dir, info)
    ordered = {layer.name: done[layer.name] for layer in layers}
    roles = {layer.name: layer.role for layer in layers}
    samples = {name: weight_sample(transformer.get_submodule(name)) for name in ordered}
    return QuantizedModel(ordered, info, recipe, roles, samples)


def _quantize_or_resume(
    group: Group,
    transformer: nn.Module,
    recipe: Recipe,
    read: Activations,
    checkpoint_dir: Path | None,
) -> tuple[dict[str, LayerTensors], dict[str, Any], bool]:
    """The group's layers, notes, and whether they were loaded from an earlier run's file."""
    path, fingerprint = None, None
    if checkpoint_dir is not None:
        path = checkpoint_dir / group.file
        fingerprint = group_fingerprint(group, transformer, recipe, read)
        found = _load_finished(path, group, fingerprint, _device(transformer))
        if found is not None:
            return *found, True
    started = time.perf_counter()
    try:
        tensors, notes = quantize_group(group, transformer, recipe, read)
    except LoraqError as error:
        names = ", ".join(unit.name for unit in group.units)
        raise LoraqError(f"{error}\n  (in {names})") from error
    notes["seconds"] = time.perf_counter() - started
    if path is not None:
        save_group(path, tensors, notes | {"fingerprint": fingerprint})
    return tensors, notes, False


def _known_moments(transformer: nn.Module, family_name: str | None) -> Mapping[str, Moment]:
    """Moments of the layer inputs that the weights determine, by input id."""
    table = None if family_name is None else family_table(family_name)
    if table is None or not hasattr(table, "known_inputs"):
        raise LoraqError(
            f"quant.statistics=weights: family '{family_name}' does not derive input moments from "
            "its weights. Use statistics=activations, which reads calibration activations, or pass "
            "family=."
        )
    known: Mapping[str, Moment] = table.known_inputs(transformer)
    return known


def _allocations(
    units: Sequence[Unit], transformer: nn.Module, recipe: Recipe, read: Activations
) -> dict[str, UnitAllocation]:
    """Rank and bits of each unit: one rank for all, or allocated within the same memory."""
    rank = choose_rank(units, recipe)
    names = [layer.name for unit in units for layer in unit.layers]
    weights = LazyMapping(names, lambda name: finite_weight(transformer, name))
    return allocate_units(units, weights, recipe, rank, read.sensitivity)


def _load_finished(
    path: Path, group: Group, fingerprint: str, device: torch.device
) -> tuple[dict[str, LayerTensors], dict[str, Any]] | None:
    """A group that an earlier run saved, on `device`; LoraqError if it is another's.

    None if it is damaged, from an earlier version, or of other layers because the earlier run had
    more or less memory.
    """
    if not keep_group(path):
        return None
    layers, notes = load_group(path, device)
    held = str(notes.get("fingerprint"))
    if held == fingerprint:
        return layers, notes
    names = {layer.name for unit in group.units for layer in unit.layers}
    regrouped = same_settings(held, fingerprint) and layers.keys() != names
    if regrouped or held.partition(":")[0] != LAYOUT:
        log.warning("'%s' was grouped by another version or device; it is made again.", path)
        return None
    raise LoraqError(
        f"'{path}' contains layers of another recipe, model or calibration. Use a separate "
        f"checkpoint_dir for each, or empty '{path.parent}'."
    )


def _device(transformer: nn.Module) -> torch.device:
    return next(transformer.parameters()).device
