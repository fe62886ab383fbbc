"""The `quantization_config` of a packed diffusers model, or of one to be quantised on loading."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any, Self

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from loraq.config import Recipe
from loraq.errors import LoraqError, unknown
from loraq.layers.serialization import expected_tensors, serialize_layers
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.utils.texts import list_of_texts

QUANT_METHOD, LAYOUT_VERSION = "loraq", "1"
ACTIVATION_FORMATS = ("activation", "branch_activation")


class QuantMethod(StrEnum):
    """diffusers reads `quant_method.value`, so a plain string is not enough."""

    LORAQ = QUANT_METHOD


class PackedConfig(QuantizationConfigMixin):
    """The method to quantise with on loading, or the layout of a saved packed model.

    method, overrides: a preset of `conf/method/` with overrides as on the command line, to quantise
        16-bit weights on loading. Data-free methods only.
    version, recipe, formats, layers: written by `save_pretrained`; `layers` are the entries of
        `loraq/layers/serialization.py`, with formats replaced by their index in `formats`.

    Raises LoraqError for an unknown entry, another `quant_method` or `version`, or missing data.
    """

    def __init__(
        self,
        method: str | None = None,
        *more: str,
        overrides: Sequence[str] = (),
        quant_method: str = QUANT_METHOD,
        version: str = LAYOUT_VERSION,
        recipe: Mapping[str, Any] | None = None,
        formats: Sequence[Mapping[str, Any]] | None = None,
        layers: Mapping[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if others:
            known = ("method", "overrides", "version", "recipe", "formats", "layers")
            raise unknown("entry of quantization_config", next(iter(others)), known)
        if str(getattr(quant_method, "value", quant_method)) != QUANT_METHOD:
            raise LoraqError(
                f"quant_method={quant_method} is not supported here, only '{QUANT_METHOD}'. Load "
                "this checkpoint with the quantizer that wrote it."
            )
        if version != LAYOUT_VERSION:
            raise LoraqError(
                f"This checkpoint has layout version {version!r}; this release reads "
                f"{LAYOUT_VERSION!r}. Use the release that wrote it, or quantise the 16-bit model "
                "again."
            )
        if (formats is None) != (layers is None):
            raise LoraqError(
                "quantization_config contains only one of 'formats' and 'layers', so the "
                "checkpoint is incomplete. Restore its config.json."
            )
        self.quant_method = QuantMethod.LORAQ
        self.method, self.overrides = method, (*more, *list_of_texts(overrides, "overrides"))
        self.version, self.recipe = version, recipe
        self.formats, self.layers = formats, layers

    def __repr__(self) -> str:
        if self.layers is None:
            arguments = ", ".join(map(repr, (self.method, *self.overrides))) if self.method else ""
            return f"{type(self).__name__}({arguments})"
        return (
            f"{type(self).__name__}({len(self.layers)} packed layers, "
            f"{len(self.formats or ())} formats, version {self.version})"
        )

    @classmethod
    def from_layers(cls, layers: Mapping[str, LayerTensors], recipe: Recipe | None) -> Self:
        """The configuration that packed layers are saved with."""
        table: list[dict[str, Any]] = []

        def index(fmt: dict[str, Any] | None) -> int | None:
            if fmt is None:
                return None
            if fmt not in table:
                table.append(fmt)
            return table.index(fmt)

        entries, _ = serialize_layers(layers)
        for entry in entries.values():
            for name in ACTIVATION_FORMATS:
                entry[name] = index(entry[name])
            for operand in OPERANDS:
                if operand in entry:
                    entry[operand]["format"] = index(entry[operand]["format"])
        plain = None if recipe is None else recipe.identity()
        return cls(recipe=plain, formats=table, layers=entries)

    def layer_entries(self) -> dict[str, Any]:
        """The entries of `loraq/layers/serialization.py`; LoraqError if one is incomplete."""
        if not isinstance(self.layers or {}, Mapping) or not isinstance(
            self.formats or [], list | tuple
        ):
            raise LoraqError(
                "quantization_config's 'layers' is not an object, or its 'formats' is not a list. "
                "Restore the checkpoint's config.json."
            )
        formats, found = list(self.formats or ()), {}
        for name, entry in (self.layers or {}).items():
            try:
                found[name] = complete = {**entry}
                for part in ACTIVATION_FORMATS:
                    complete[part] = None if entry[part] is None else formats[entry[part]]
                for operand in OPERANDS:
                    if operand in entry:
                        fmt = formats[entry[operand]["format"]]
                        complete[operand] = {**entry[operand], "format": fmt}
                expected_tensors({name: complete})
            except (KeyError, IndexError, TypeError, ValueError, LoraqError) as error:
                reason = error if isinstance(error, LoraqError) else repr(error)
                raise LoraqError(
                    f"quantization_config's entry of '{name}' is incomplete or damaged ({reason}). "
                    "Restore the checkpoint's config.json."
                ) from None
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PackedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def to_dict(self) -> dict[str, Any]:
        """The entries of `quantization_config` in `config.json`."""
        plain: dict[str, Any] = {"quant_method": QUANT_METHOD, "version": self.version}
        if self.method is not None:
            plain |= {"method": self.method, "overrides": list(self.overrides)}
        for name in ("recipe", "formats", "layers"):
            if getattr(self, name) is not None:
                plain[name] = getattr(self, name)
        return plain

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()
