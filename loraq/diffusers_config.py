"""The `quantization_config` of a packed diffusers model, or of one to be packed while it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from loraq.config import Recipe
from loraq.errors import LoraqError, unknown
from loraq.layers.serialization import describe, planned
from loraq.layers.tensors import OPERANDS
from loraq.quantizer import QuantizedModel

NAME, VERSION = "loraq", "1"
FORMATS = ("activation", "branch_activation")


class Method(StrEnum):
    """diffusers asks a method for its `value`."""

    LORAQ = NAME


class LoRaQConfig(QuantizationConfigMixin):
    """What to quantise with, or how a saved model was packed.

    method, overrides: a preset of `conf/method/` with overrides as on the command line; for
        quantising while 16-bit weights are loaded. Data-free methods only.
    version, recipe, formats, layers: written by `save_pretrained`; `layers` are the entries of
        `loraq/layers/serialization.py`, with formats replaced by their place in `formats`.
    """

    def __init__(
        self,
        method: str | None = None,
        *more: str,
        overrides: Sequence[str] = (),
        quant_method: str = NAME,
        version: str = VERSION,
        recipe: Mapping[str, Any] | None = None,
        formats: Sequence[Mapping[str, Any]] | None = None,
        layers: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if others:
            known = ("method", "overrides", "version", "recipe", "formats", "layers")
            raise unknown("entry of quantization_config", next(iter(others)), known)
        if str(getattr(quant_method, "value", quant_method)) != NAME:
            raise LoraqError(f"quant_method={quant_method} is not ours: this reads '{NAME}' only.")
        if version != VERSION:
            raise LoraqError(
                f"This checkpoint has layout version {version!r}; this release reads {VERSION!r}. "
                "Use the release that wrote it, or quantise the 16-bit model again."
            )
        if (formats is None) != (layers is None):
            raise LoraqError(
                "quantization_config holds only one of 'formats' and 'layers', so the checkpoint "
                "is not whole. Restore its config.json."
            )
        self.quant_method = Method.LORAQ
        self.method, self.overrides = method, (*more, *overrides)
        self.version, self.recipe = version, recipe
        self.formats, self.layers = formats, layers

    @classmethod
    def of(cls, model: QuantizedModel) -> LoRaQConfig:
        """The configuration that a packed model is saved with."""
        table: list[dict[str, Any]] = []

        def number(fmt: dict[str, Any] | None) -> int | None:
            if fmt is None:
                return None
            if fmt not in table:
                table.append(fmt)
            return table.index(fmt)

        entries, _ = describe(model.layers)
        for entry in entries.values():
            for name in FORMATS:
                entry[name] = number(entry[name])
            for operand in OPERANDS:
                if operand in entry:
                    entry[operand]["format"] = number(entry[operand]["format"])
        recipe = None if model.recipe is None else model.recipe.identity()
        return cls(recipe=recipe, formats=table, layers=entries)

    def entries(self) -> dict[str, Any]:
        """The entries of `loraq/layers/serialization.py`; LoraqError where one is not whole."""
        formats, found = list(self.formats or ()), {}
        for name, entry in (self.layers or {}).items():
            found[name] = whole = {**entry}
            try:
                for part in FORMATS:
                    whole[part] = None if entry[part] is None else formats[entry[part]]
                for operand in OPERANDS:
                    if operand in entry:
                        fmt = formats[entry[operand]["format"]]
                        whole[operand] = {**entry[operand], "format": fmt}
                planned({name: whole})
            except (KeyError, IndexError, TypeError) as error:
                raise LoraqError(
                    f"quantization_config's entry of '{name}' is not whole ({error!r}). Restore "
                    "the checkpoint's config.json."
                ) from None
        return found

    def recipe_asked(self) -> Recipe:
        """The recipe of `method`; LoraqError where there is none, or it reads activations."""
        from loraq.api import recipe

        if self.method is None:
            raise LoraqError(
                "LoRaQConfig() names no method for quantising 16-bit weights, and no packed "
                "layers. Give a method: LoRaQConfig('loraq_best'), or LoRaQConfig('loraq_o2', "
                "'quant.branch.rank=16'); or restore the checkpoint's config.json."
            )
        chosen = recipe(self.method, *self.overrides)
        if chosen.needs_calibration:
            raise LoraqError(
                f"method {self.method} reads activations, and there are none while weights are "
                "loaded. Load the 16-bit pipeline and use loraq.quantize(pipe, …, prompts=[…]), or "
                "take a data-free method such as loraq_best."
            )
        return chosen

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LoRaQConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """What `config.json` holds."""
        plain: dict[str, Any] = {"quant_method": NAME, "version": self.version}
        if self.method is not None:
            plain |= {"method": self.method, "overrides": list(self.overrides)}
        for name in ("recipe", "formats", "layers"):
            if getattr(self, name) is not None:
                plain[name] = getattr(self, name)
        return plain

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
