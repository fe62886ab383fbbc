"""Quantise the layers of a transformer group by group, and save each finished group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import nn

from loraq.config import Recipe
from loraq.layers.tensors import LayerTensors
from loraq.models.layers import Layer
from loraq.quantization.activations import Activations
from loraq.quantization.group_file import group_files, load_group, remove_regrouped, save_group
from loraq.quantization.group_work import GroupWork
from loraq.quantization.grouping import Group
from loraq.quantization.made_from import weight_sample
from loraq.quantization.model import QuantizedModel
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.files import ABANDONED, remove_temporaries
from loraq.utils.memory import reused_heap
from loraq.utils.parts import Claim, Part, alone, make_parts

if TYPE_CHECKING:
    from tqdm import tqdm


def quantize_model(
    transformer: nn.Module,
    layers: Sequence[Layer],
    recipe: Recipe,
    activations: Activations | None = None,
    checkpoint_dir: Path | None = None,
    progress: str | None = "quantise",
    family: str | None = None,
) -> QuantizedModel:
    """Quantise `layers` of `transformer` with `recipe`; does not change the transformer.

    activations: of the 16-bit model, for calibrated recipes; data-free recipes do not read them.
    checkpoint_dir: every finished group is saved here, and a later call resumes from it.
    progress: label of the progress bar; None disables it.
    family: the model's family, which `statistics=weights` reads the inputs' moments from.

    Raises LoraqError if the recipe's activations are missing, or if checkpoint_dir contains groups
    of another recipe, model or calibration.
    """
    done: dict[str, LayerTensors] = {}
    info: dict[str, Any] = {}
    device = next(transformer.parameters()).device
    if checkpoint_dir is None:
        work = GroupWork.of(transformer, layers, recipe, activations, family)
        with work.bar(progress) as bar, reused_heap() as trim:
            for group in work.groups:
                tensors, info[group.name] = work.quantize(group)
                done.update(tensors)
                trim()
                _show(bar, group, info[group.name])
                bar.update(group.weights)
    else:
        with reporting_disk_errors(checkpoint_dir):
            checkpoint_dir.mkdir(parents=True, exist_ok=True)
        remove_temporaries(checkpoint_dir, ABANDONED)
        made: dict[str, tuple[dict[str, LayerTensors], dict[str, Any]]] = {}
        for name in quantize_groups(
            transformer, layers, recipe, checkpoint_dir, activations, progress, family, made=made
        ):
            path = checkpoint_dir / f"{name}.safetensors"
            tensors, info[name] = made.get(name) or load_group(path, device)
            done.update(tensors)
    ordered = {layer.name: done[layer.name] for layer in layers}
    roles = {layer.name: layer.role for layer in layers}
    samples = {name: weight_sample(transformer.get_submodule(name)) for name in ordered}
    return QuantizedModel(ordered, info, recipe, roles, samples)


def quantize_groups(
    transformer: nn.Module,
    layers: Sequence[Layer],
    recipe: Recipe,
    folder: Path,
    activations: Activations | None = None,
    progress: str | None = "quantise",
    family: str | None = None,
    release: Callable[[], None] | None = None,
    claim: Claim = alone,
    made: dict[str, tuple[dict[str, LayerTensors], dict[str, Any]]] | None = None,
) -> list[str]:
    """Write the packed layers of all groups that are not in `folder`; returns the groups' names.

    As `quantize_model`; `folder` exists. release: called after every group to unmap the 16-bit
    weights it read. claim: lets several processes share the groups; on return all are finished, by
    any process, and another may have renamed the folder. made: to be filled with layers and notes
    of the groups that this process makes; None: they are not kept in memory.
    """
    work = GroupWork.of(transformer, layers, recipe, activations, family)
    names = [group.name for group in work.groups]
    parts = [
        Part(number, name, [folder / file for file in group_files([name])])
        for number, name in enumerate(names)
    ]
    earlier = {part.name for part in parts if part.files[0].is_file()}
    with work.bar(progress) as bar, reused_heap() as trim:

        def tidy() -> None:
            if release is not None:
                release()
            trim()

        def keep(part: Part) -> bool:
            kept = work.is_finished(work.groups[part.number], part.files[0])
            if kept:
                tidy()
            else:
                earlier.discard(part.name)
            return kept

        def make(part: Part) -> None:
            group = work.groups[part.number]
            tensors, notes = work.quantize(group)
            save_group(part.files[0], tensors, notes | {"fingerprint": work.fingerprint(group)})
            _show(bar, group, notes)
            if made is not None:
                made[part.name] = tensors, notes
            del tensors
            tidy()

        def done(part: Part) -> None:
            weights = work.groups[part.number].weights
            if part.name in earlier and not bar.disable:  # keep them out of the estimated speed
                bar.initial, bar.n = bar.initial + weights, bar.n + weights
                bar.refresh()
            else:
                bar.update(weights)

        make_parts(folder, parts, claim, make, done, keep)
    with contextlib.suppress(FileNotFoundError):  # another process has finished the product
        remove_regrouped(folder, names)
    return names


def _show(bar: tqdm[NoReturn], group: Group, notes: Mapping[str, Any]) -> None:
    """Show the group that was made, and its error."""
    error = f" error {notes['losses'][-1]:.4f}" if notes["losses"] else ""
    bar.set_postfix_str(group.name + error, refresh=False)
