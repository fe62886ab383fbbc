"""Walk the layers in groups, compose transform → branch → rounding, keep each finished group."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.layers.tensors import LayerTensors
from loraq.models.layers import Layer
from loraq.models.layers import find_family as family_table
from loraq.models.moments import Moment
from loraq.models.pointwise import weight_matrix
from loraq.quantization.activations import Activations
from loraq.quantization.allocation.allocate import allocate
from loraq.quantization.budget import choose_rank
from loraq.quantization.fingerprint import fingerprint
from loraq.quantization.group_file import load_group, save_group
from loraq.quantization.grouping import Group, Share, Unit, make_groups, make_units
from loraq.quantization.model import QuantizedModel
from loraq.quantization.solve import quantize_group
from loraq.utils.lazy_mapping import LazyMapping
from loraq.utils.memory import reused_heap


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
    """Quantise `layers` of `transformer` by `recipe`; the transformer itself is left as it is.

    activations: of the 16-bit model, for calibrated recipes; a data-free one never sees them.
    checkpoint_dir: every finished group is written here at once and found again by a later call.
    progress: label of the progress bar, None for none.
    family: of the model; `statistics=weights` asks it what weights tell of the inputs.
    release: called after every group, to let go of the 16-bit weights that were read; finished
        layers are then mapped from their files as well, so that neither takes memory.
    """
    from tqdm import tqdm

    read = (activations or Activations()).allowed(recipe)
    if recipe.statistics == "weights":
        read = replace(read, moments=_known_moments(transformer, family))
    units = make_units(layers, recipe.branch.share_qkv)
    shares = _shares(units, transformer, recipe, read)
    done: dict[str, LayerTensors] = {}
    info: dict[str, Any] = {}
    bar = tqdm(
        total=sum(unit.weights for unit in units),
        desc=progress,
        unit=" weights",
        unit_scale=True,
        smoothing=0,  # the mean pace: kinds of layers take turns
        disable=progress is None,
    )
    with bar, reused_heap() as trim:
        for group in make_groups(units, shares):
            tensors, notes, resumed = _group(group, transformer, recipe, read, checkpoint_dir)
            if release is not None:
                release()
                if checkpoint_dir is not None:
                    tensors, _ = load_group(checkpoint_dir / group.file)
            done.update(tensors)
            info[group.name] = notes
            trim()
            error = f" error {notes['losses'][-1]:.4f}" if notes["losses"] else ""
            bar.set_postfix_str(group.name + error, refresh=False)
            if resumed and not bar.disable:  # no work of this call: the pace leaves it out
                bar.initial, bar.n = bar.initial + group.weights, bar.n + group.weights
                bar.refresh()
            else:
                bar.update(group.weights)
    ordered = {layer.name: done[layer.name] for layer in layers}
    return QuantizedModel(ordered, info, recipe)


def _group(
    group: Group,
    transformer: nn.Module,
    recipe: Recipe,
    read: Activations,
    checkpoint_dir: Path | None,
) -> tuple[dict[str, LayerTensors], dict[str, Any], bool]:
    """The group's layers with their notes, and whether an earlier run had finished them."""
    path, mark = None, None
    if checkpoint_dir is not None:
        path, mark = checkpoint_dir / group.file, fingerprint(group, transformer, recipe, read)
        found = _finished(path, mark)
        if found is not None:
            return *found, True
    started = time.perf_counter()
    tensors, notes = quantize_group(group, transformer, recipe, read)
    notes["seconds"] = time.perf_counter() - started
    if path is not None:
        save_group(path, tensors, notes | {"fingerprint": mark})
    return tensors, notes, False


def _known_moments(transformer: nn.Module, family_name: str | None) -> Mapping[str, Moment]:
    """Moments of layer inputs that follow from the weights alone."""
    table = None if family_name is None else family_table(family_name)
    if table is None or not hasattr(table, "known_inputs"):
        raise LoraqError(
            f"quant.statistics=weights: family '{family_name}' does not say what its weights tell "
            "of the layers' inputs. Use statistics=activations, which reads calibration "
            "activations, or pass family=."
        )
    known: Mapping[str, Moment] = table.known_inputs(transformer)
    return known


def _shares(
    units: Sequence[Unit], transformer: nn.Module, recipe: Recipe, read: Activations
) -> dict[str, Share]:
    """Each unit's rank and bits: one rank for all, or given out under the same memory."""
    rank = choose_rank(units, recipe)
    if recipe.allocation.kind == "uniform":
        return {unit.name: Share(rank) for unit in units}
    names = [layer.name for unit in units for layer in unit.layers]
    weights = LazyMapping(names, lambda name: weight_matrix(transformer.get_submodule(name)))
    return allocate(units, weights, recipe, rank, read.sensitivity)


def _finished(path: Path, mark: str) -> tuple[dict[str, LayerTensors], dict[str, Any]] | None:
    """A group that an earlier run wrote; a damaged file is made again, a foreign one is refused."""
    if not path.is_file():
        return None
    try:
        layers, notes = load_group(path)
    except LoraqError:
        path.unlink()
        return None
    if notes.get("fingerprint") != mark:
        raise LoraqError(
            f"'{path}' holds layers of another recipe, model or calibration. Give each its own "
            f"checkpoint_dir, or empty '{path.parent}'."
        )
    return layers, notes
