"""A quantised model: its packed layers, what they cost, and how they are put into a transformer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear, set_compute
from loraq.layers.shared_input import share_inputs
from loraq.layers.tensors import LayerTensors


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
            from loraq.quantization.diffusers_packed import attach

            attach(transformer, self.layers, self.recipe)

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
            from loraq.quantization.diffusers_packed import forget

            forget(transformer)

    @contextlib.contextmanager
    def applied(self, transformer: nn.Module, compute: str = "emulate") -> Iterator[None]:
        """The packed layers are in `transformer` while the block runs, whatever happens in it."""
        self.apply(transformer)
        try:
            if compute != "emulate":  # which is how packed layers start
                set_compute(transformer, compute)
            yield
        finally:
            self.revert(transformer)

    def subset(self, names: Iterable[str]) -> QuantizedModel:
        """The packed layers `names` alone."""
        return QuantizedModel({name: self.layers[name] for name in names})

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
