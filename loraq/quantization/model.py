"""A quantised model: its packed layers, their memory, and how they are put into a transformer."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.layers.backends import ComputeMode
from loraq.layers.linear import QuantizedLinear, set_compute
from loraq.layers.shared_input import share_inputs
from loraq.layers.tensors import LayerTensors
from loraq.models.adapters import refuse_adapters
from loraq.models.denoisers import of_part, parts, same_parts
from loraq.quantization.made_from import check_made_from, network_of
from loraq.quantization.trace import check_called

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(repr=False)
class QuantizedModel:
    """The packed layers of a transformer or two experts by name, notes on groups, and the recipe.

    info: group name → losses, seconds and other notes; roles: layer name → role, for display.
    samples: layer name → `weight_sample` of the 16-bit layer, by which `apply` knows its model.
    adapters: bytes of LoRA beside the packed layers by its name, which `nbytes` does not contain.
    """

    layers: dict[str, LayerTensors]
    info: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    samples: Mapping[str, Tensor] = field(default_factory=dict)
    adapters: Mapping[str, int] = field(default_factory=dict)
    _originals: dict[str, nn.Module] = field(default_factory=dict)
    _applied_to: nn.Module | None = None

    def __repr__(self) -> str:
        if not self.layers:
            return "QuantizedModel(0 layers)"
        ranks = self.ranks
        parts = [
            f"{len(self.layers)} layers",
            f"{_count(self.weights)} weights",
            f"{self.bits_per_weight:.3f} bits/weight",
            f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}..{ranks[-1]}",
            f"weight={_formats(self.layers.values(), 'weight')}",
        ]
        if ranks != [0]:
            parts.append(f"branch={_formats(self.layers.values(), 'left')}")
        for adapter, size in self.adapters.items():
            bits = 8 * size / self.weights
            parts.append(f"beside them LoRA '{adapter}' of {bits:.3f} bits/weight")
        method = "" if self.recipe is None else f"{_method(self.recipe)}: "
        return f"QuantizedModel({method}{', '.join(parts)})"

    def _repr_html_(self) -> str:
        """A table by role for notebooks."""
        header = ("role", "layers", "shape", "bits/weight", "rank", "mean final loss")
        by_role: dict[tuple[str, tuple[int, ...]], list[str]] = {}
        for name, tensors in self.layers.items():
            role = self.roles.get(name, name.rpartition(".")[2])
            by_role.setdefault((role, tensors.weight.shape), []).append(name)
        losses = self._final_losses()
        rows = []
        for (role, shape), names in by_role.items():
            part = self.subset(names)
            cells = (
                role,
                len(names),
                " × ".join(map(str, shape)),
                f"{part.bits_per_weight:.3f}",
                "..".join(map(str, dict.fromkeys((part.ranks[0], part.ranks[-1])))),
                f"{losses[role]:.4f}" if role in losses else "",
            )
            rows.append("".join(f"<td>{html.escape(str(cell))}</td>" for cell in cells))
        head = "".join(f"<th>{cell}</th>" for cell in header)
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        return f"<p>{html.escape(repr(self))}</p><table><tr>{head}</tr>{body}</table>"

    def _final_losses(self) -> dict[str, float]:
        """Role → mean of the last losses of its groups, whose names start with their roles."""
        found: dict[str, list[float]] = {}
        for group, notes in self.info.items():
            if notes.get("losses"):
                for role in group.partition(".")[0].split("+"):
                    found.setdefault(role, []).append(notes["losses"][-1])
        return {role: sum(values) / len(values) for role, values in found.items()}

    def apply(self, transformer: nn.Module | DiffusionPipeline) -> None:
        """Replace the quantised linears of `transformer` by `QuantizedLinear`, in place.

        transformer: or its pipeline, as for the other methods; of two experts, the pipeline.
        A diffusers model then saves packed layers. Raises LoraqError if it is quantised already, or
        if the layers were made from another model.
        """
        transformer = network_of(transformer)
        refuse_adapters(transformer, "which packed layers would replace")
        if any(isinstance(module, QuantizedLinear) for module in transformer.modules()):
            raise LoraqError(
                f"This {type(transformer).__name__} is quantised already. Restore its 16-bit "
                "layers with `.revert(transformer)` of the QuantizedModel that was applied, or "
                "load the 16-bit model again."
            )
        if self._originals:
            raise LoraqError(
                f"This quantised model is applied to another {type(self._applied_to).__name__} and "
                "holds its 16-bit layers. Call `.revert` with that transformer first."
            )
        check_made_from(transformer, self.layers, self.samples)
        self._applied_to = transformer
        modules = []
        for name, tensors in self.layers.items():
            original = self._originals[name] = transformer.get_submodule(name)
            module = QuantizedLinear(tensors, isinstance(original, nn.Conv2d))
            transformer.set_submodule(name, module, strict=True)
            modules.append(module)
        share_inputs(modules)
        for part, network in parts(transformer).items():
            if hasattr(network, "register_to_config"):  # diffusers' models
                from loraq.quantization.diffusers_packed import attach  # imports diffusers: heavy

                attach(network, of_part(self.layers, part), self.recipe)

    def check_called(self, transformer: nn.Module | DiffusionPipeline) -> None:
        """Raise LoraqError unless `transformer`, after `apply`, computes with all packed layers.

        One forward is traced: every packed layer is called, and no weight that was replaced is.
        """
        check_called(network_of(transformer), self._originals)

    def revert(self, transformer: nn.Module | DiffusionPipeline) -> None:
        """Restore the 16-bit layers that `apply` replaced; LoraqError without them.

        transformer: the one that this model was applied to; LoraqError for another.
        """
        transformer = network_of(transformer)
        if self.layers and not self._originals:
            raise LoraqError(
                "There are no 16-bit layers to restore: this quantised model was not applied, or "
                "was loaded without them. Load the 16-bit model instead."
            )
        if not same_parts(transformer, self._applied_to):
            raise LoraqError(
                f"This quantised model was applied to another {type(self._applied_to).__name__}, "
                "whose 16-bit layers it holds. Pass that transformer to `revert`."
            )
        refuse_adapters(transformer, "which the 16-bit layers would replace")
        for name, original in self._originals.items():
            transformer.set_submodule(name, original, strict=True)
        self._originals.clear()
        self._applied_to = None
        for network in parts(transformer).values():
            if hasattr(network, "register_to_config"):
                from loraq.quantization.diffusers_packed import forget  # imports diffusers: heavy

                forget(network)

    @contextlib.contextmanager
    def applied(
        self, transformer: nn.Module | DiffusionPipeline, compute: ComputeMode = "emulate"
    ) -> Iterator[None]:
        """Context manager: `apply` on entry, `revert` on exit, also after an exception."""
        transformer = network_of(transformer)
        self.apply(transformer)
        try:
            if compute != "emulate":  # the initial setting of packed layers
                set_compute(transformer, compute)
            yield
        finally:
            self.revert(transformer)

    def subset(self, names: Iterable[str]) -> QuantizedModel:
        """A model of the packed layers `names` only."""
        return QuantizedModel({name: self.layers[name] for name in names})

    @property
    def ranks(self) -> list[int]:
        """Distinct ranks in ascending order; [0] if no layer has a branch."""
        return sorted({0 if t.left is None else t.left.shape[-1] for t in self.layers.values()})

    @property
    def rank_range(self) -> int | str:
        """The rank of all layers, or "lowest–highest" if ranks were allocated per layer."""
        ranks = self.ranks
        return ranks[0] if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"

    @property
    def rank(self) -> int:
        """The rank of all layers; LoraqError if it differs between layers (see `ranks`)."""
        if len(self.ranks) > 1:
            raise LoraqError(
                f"This model has ranks from {self.ranks[0]} to {self.ranks[-1]}: read `ranks`."
            )
        return self.ranks[0]

    @property
    def weights(self) -> int:
        """Number of weights of the quantised layers."""
        return sum(t.weight.shape[0] * t.weight.shape[1] for t in self.layers.values())

    @property
    def nbytes(self) -> int:
        """Stored bytes: main weights, branches (a shared R once), transforms; without biases."""
        packed = [
            getattr(t, part) for t in self.layers.values() for part in ("weight", "left", "right")
        ]
        operands = {id(p): p.nbytes for p in packed if p is not None}
        transforms = {id(t.transform): t.transform.nbytes for t in self.layers.values()}
        return sum(operands.values()) + sum(transforms.values())

    @property
    def branch_nbytes(self) -> int:
        """Stored bytes of the branches, a shared R once."""
        packed = [getattr(t, part) for t in self.layers.values() for part in ("left", "right")]
        return sum({id(p): p.nbytes for p in packed if p is not None}.values())

    @property
    def bits_per_weight(self) -> float:
        """8 · nbytes / weights."""
        return 8 * self.nbytes / self.weights

    @property
    def branch_bits_per_weight(self) -> float:
        """8 · branch_nbytes / weights."""
        return 8 * self.branch_nbytes / self.weights


def _count(number: int) -> str:
    """12400000 → '12.4M'."""
    for unit, suffix in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.4g}{suffix}"
    return str(number)


def _formats(layers: Iterable[LayerTensors], operand: str) -> str:
    """The distinct formats of an operand: 'int4', or 'int4/int8'."""
    held = (getattr(tensors, operand) for tensors in layers)
    return "/".join(dict.fromkeys(packed.format.name for packed in held if packed is not None))


def _method(recipe: Recipe) -> str:
    """The branch and its objective, such as 'loraq/shape'; without one, the rounding."""
    branch = recipe.branch
    if branch.kind == "none":
        return recipe.rounding.kind
    return f"{Path(branch.kind).stem}/{branch.objective}"
