"""Walk the layers in groups, compose transform → branch → rounding, keep each finished group."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.budget import branch_bits, check_rank, rank_for_budget
from loraq.capture import Activations
from loraq.checkpoint import load_group, save_group
from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.group import quantize_group
from loraq.layers.linear import QuantizedLinear
from loraq.layers.shared_input import share_inputs
from loraq.layers.tensors import LayerTensors
from loraq.models.layers import Layer
from loraq.models.layers import family as family_table
from loraq.models.moments import Moment
from loraq.models.pointwise import weight_matrix
from loraq.units import Group, Share, Unit, make_groups, make_units
from loraq.utils.lazy_mapping import LazyMapping
from loraq.utils.memory import reused_heap

VERSION = 1
"""Part of every quantised product's key; raised when the numbers of every method change."""
BRANCH_VERSIONS = {("alternating", "output"): 2, ("alternating", "weight"): 4}
"""The same for one kind of branch and what it selects by; what is not listed has none."""


@dataclass
class QuantizedModel:
    """The packed layers of one transformer, with what they cost and how they were found."""

    layers: dict[str, LayerTensors]
    info: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    _originals: dict[str, nn.Module] = field(default_factory=dict, repr=False)

    def apply(self, transformer: nn.Module) -> None:
        """Put `QuantizedLinear` in the place of every quantised linear of `transformer`."""
        if any(isinstance(module, QuantizedLinear) for module in transformer.modules()):
            raise LoraqError(
                f"This {type(transformer).__name__} is quantised already. Put its 16-bit layers "
                "back with `.revert(transformer)` of what quantised it, or load it anew."
            )
        modules = []
        for name, tensors in self.layers.items():
            original = self._originals[name] = transformer.get_submodule(name)
            module = QuantizedLinear(tensors, isinstance(original, nn.Conv2d))
            transformer.set_submodule(name, module, strict=True)
            modules.append(module)
        share_inputs(modules)
        if hasattr(transformer, "register_to_config"):  # diffusers' models
            from loraq.diffusers_quantizer import attach

            attach(transformer, self)

    def revert(self, transformer: nn.Module) -> None:
        """Put the 16-bit linears back that `apply` took out."""
        if self.layers and not self._originals:
            raise LoraqError(
                "There is nothing to put back: this quantised model was not applied, or was loaded "
                "without 16-bit layers."
            )
        for name, original in self._originals.items():
            transformer.set_submodule(name, original, strict=True)
        self._originals.clear()
        if hasattr(transformer, "register_to_config"):
            from loraq.diffusers_quantizer import forget

            forget(transformer)

    @property
    def ranks(self) -> list[int]:
        """The ranks that occur, rising; [0] without any branch."""
        return sorted({0 if t.left is None else t.left.shape[-1] for t in self.layers.values()})

    @property
    def rank(self) -> int:
        """The one rank of all layers; LoraqError where ranks were given out by sensitivity."""
        if len(self.ranks) > 1:
            raise LoraqError(
                f"This model has ranks from {self.ranks[0]} to {self.ranks[-1]}: read `ranks`."
            )
        return self.ranks[0]

    @property
    def weights(self) -> int:
        """Weights of the quantised set."""
        return sum(t.weight.shape[0] * t.weight.shape[1] for t in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Stored bytes of the set: main weights, branches (a shared R once), transforms."""
        packed = [
            getattr(t, part) for t in self.layers.values() for part in ("weight", "left", "right")
        ]
        operands = {id(p): p.nbytes for p in packed if p is not None}
        transforms = {id(t.transform): t.transform.nbytes for t in self.layers.values()}
        return sum(operands.values()) + sum(transforms.values())

    @property
    def branch_nbytes(self) -> int:
        """Those of the branches alone."""
        packed = [getattr(t, part) for t in self.layers.values() for part in ("left", "right")]
        return sum({id(p): p.nbytes for p in packed if p is not None}.values())

    @property
    def bits_per_weight(self) -> float:
        """Of the quantised set, everything stored."""
        return 8 * self.nbytes / self.weights

    @property
    def branch_bits_per_weight(self) -> float:
        return 8 * self.branch_nbytes / self.weights


def choose_rank(units: Sequence[Unit], recipe: Recipe) -> int:
    """The uniform rank: as asked for, or what the budget buys; 0 without a branch."""
    if recipe.branch.kind == "none":
        return 0
    shapes = [unit.shape for unit in units]
    if recipe.branch.rank is not None:
        return check_rank(shapes, recipe.branch.rank)
    assert recipe.branch.budget is not None
    return rank_for_budget(shapes, recipe.branch.budget, recipe.formats()["branch_weight"])


def planned_branch_bits(layers: Sequence[Layer], recipe: Recipe) -> tuple[int, float]:
    """(rank, branch bits per weight) before anything is computed, for plans."""
    units = make_units(layers, recipe.branch.share_qkv)
    rank = choose_rank(units, recipe)
    weights = sum(u.shape[0] * u.shape[1] for u in units)
    bits = branch_bits([u.shape for u in units], rank, recipe.formats()["branch_weight"])
    return rank, bits / weights


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
    from loraq.allocation import allocate

    names = [layer.name for unit in units for layer in unit.layers]
    weights = LazyMapping(names, lambda name: weight_matrix(transformer.get_submodule(name)))
    return allocate(units, weights, recipe, rank, read.sensitivity)


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


@torch.no_grad()
def layer_errors(
    model: QuantizedModel,
    transformer: nn.Module,
    layers: Sequence[Layer],
    inputs: Mapping[str, Tensor],
) -> list[dict[str, Any]]:
    """Per layer ‖W − Ŵ‖/‖W‖ and ‖Y − Ŷ‖/‖Y‖ (bias left out of Y), in the original basis.

    `transformer` is the 16-bit one, `inputs` its own activations on captions kept for measuring.
    """
    rows = []
    for layer in layers:
        linear = transformer.get_submodule(layer.name)
        w_OI = weight_matrix(linear).float()
        x_TI = inputs[layer.shares_input].float()
        tensors = model.layers[layer.name].to(x_TI.device)
        y_TO = x_TI @ w_OI.T
        offset = 0.0 if linear.bias is None else linear.bias.float()
        error = tensors.forward(x_TI) - offset - y_TO
        weight_error = (tensors.effective_weight() - w_OI).norm() / w_OI.norm()
        rows.append(
            {
                "layer": layer.name,
                "role": layer.role,
                "weight_error": weight_error.item(),
                "output_error": (error.norm() / y_TO.norm()).item(),
            }
        )
    return rows
