"""The `quantization_config` of a packed diffusers model, or of one to be packed while it loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Self

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from loraq.config import Recipe
from loraq.errors import LoraqError, unknown
from loraq.layers.serialization import expected_tensors, serialize_layers
from loraq.layers.tensors import OPERANDS, LayerTensors

NAME, VERSION = "loraq", "1"
FORMATS = ("activation", "branch_activation")


class Method(StrEnum):
    """diffusers asks a method for its `value`."""

    LORAQ = NAME


class PackedConfig(QuantizationConfigMixin):
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
    def of(cls, layers: Mapping[str, LayerTensors], recipe: Recipe | None) -> Self:
        """The configuration that a packed model is saved with."""
        table: list[dict[str, Any]] = []

        def number(fmt: dict[str, Any] | None) -> int | None:
            if fmt is None:
                return None
            if fmt not in table:
                table.append(fmt)
            return table.index(fmt)

        entries, _ = serialize_layers(layers)
        for entry in entries.values():
            for name in FORMATS:
                entry[name] = number(entry[name])
            for operand in OPERANDS:
                if operand in entry:
                    entry[operand]["format"] = number(entry[operand]["format"])
        plain = None if recipe is None else recipe.identity()
        return cls(recipe=plain, formats=table, layers=entries)

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
                expected_tensors({name: whole})
            except (KeyError, IndexError, TypeError) as error:
                raise LoraqError(
                    f"quantization_config's entry of '{name}' is not whole ({error!r}). Restore "
                    "the checkpoint's config.json."
                ) from None
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedConfig) and self.to_dict() == other.to_dict()

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
