"""The table of formats, and `get_format`, which builds a `Format` from a name and options.

A new format is one row of `FORMATS` (and, if its element is new, one element).
Sources: OCP Microscaling Formats (MX) v1.0; NVFP4 as described by NVIDIA; SVDQuant for int4/uint4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from loraq.errors import LoraqError, unknown
from loraq.formats.elements import Element, FloatElement, IntegerElement

PACKED_BITS = (4, 6, 8)

E4M3 = FloatElement(4, 3, 448.0)
E5M2 = FloatElement(5, 2, 57344.0)
E2M3 = FloatElement(2, 3, 7.5)
E3M2 = FloatElement(3, 2, 28.0)
E2M1 = FloatElement(2, 1, 6.0)

Family = Literal["int", "uint", "mxint", "mxfp", "nvfp", "float"]
ScaleFormat = Literal["fp16", "bf16", "e8m0", "e4m3", "none"]
ExponentRule = Literal["floor", "ceil", "even", "rceil"]
ClipRule = Literal["none", "mse"]
TensorScale = Literal["none", "tensor", "token", "fixed", "fixed_floor"]
BlockName = Literal["channel", "token", "tensor"]

EXPONENT_RULES: tuple[ExponentRule, ...] = get_args(ExponentRule)
CLIP_RULES: tuple[ClipRule, ...] = get_args(ClipRule)
TENSOR_SCALES: tuple[TensorScale, ...] = ("tensor", "token", "fixed", "fixed_floor")
FULL_AXIS = ("channel", "token")  # values of `block`: one scale for the complete last axis

Choice = TypeVar("Choice", bound=str)


@dataclass(frozen=True)
class FormatSpec:
    """A row of the table: the properties of a named format, and the defaults of its options."""

    family: Family
    bits: int
    element: Element | None
    block: int | None
    scales: tuple[ScaleFormat, ...]  # allowed scale formats, the default first
    source: str

    def __post_init__(self) -> None:
        if self.element is None:
            return
        if self.bits not in PACKED_BITS or self.element.bits > self.bits:
            raise LoraqError(
                f"A code of {self.bits} bits with an element of {self.element.bits} bits: codes "
                f"are packed with {', '.join(map(str, PACKED_BITS))} bits (formats/packing.py), "
                "and the element must fit. Use the next larger number of bits."
            )


_SIXTEEN: tuple[ScaleFormat, ...] = ("fp16", "bf16")
FORMATS: dict[str, FormatSpec] = {
    "int4": FormatSpec("int", 4, IntegerElement(4), 64, _SIXTEEN, "SVDQuant"),
    "int6": FormatSpec("int", 6, IntegerElement(6), 64, _SIXTEEN, "SVDQuant"),
    "int8": FormatSpec("int", 8, IntegerElement(8), 64, _SIXTEEN, "SVDQuant"),
    "uint4": FormatSpec("uint", 4, IntegerElement(4, signed=False), 64, _SIXTEEN, "SVDQuant"),
    "mxfp8_e4m3": FormatSpec("mxfp", 8, E4M3, 32, ("e8m0",), "OCP MX v1.0"),
    "mxfp8_e5m2": FormatSpec("mxfp", 8, E5M2, 32, ("e8m0",), "OCP MX v1.0"),
    "mxfp6_e2m3": FormatSpec("mxfp", 6, E2M3, 32, ("e8m0",), "OCP MX v1.0"),
    "mxfp6_e3m2": FormatSpec("mxfp", 6, E3M2, 32, ("e8m0",), "OCP MX v1.0"),
    "mxfp4_e2m1": FormatSpec("mxfp", 4, E2M1, 32, ("e8m0",), "OCP MX v1.0"),
    "mxint8": FormatSpec("mxint", 8, IntegerElement(8, True, 6), 32, ("e8m0",), "OCP MX v1.0"),
    "mxint6": FormatSpec("mxint", 6, IntegerElement(6, True, 4), 32, ("e8m0",), "as mxint4"),
    "mxint4": FormatSpec("mxint", 4, IntegerElement(4, True, 2), 32, ("e8m0",), "microxcaling"),
    "nvfp4": FormatSpec("nvfp", 4, E2M1, 16, ("e4m3",), "NVIDIA"),
    "bf16": FormatSpec("float", 16, None, None, ("none",), "bfloat16"),
    "fp16": FormatSpec("float", 16, None, None, ("none",), "IEEE 754"),
}


@dataclass(frozen=True)
class Format:
    """A number format: element type, block size and scale format.

    block: values per scale along the last axis; None: the complete axis; -1: the complete tensor.
    exponent: rounding of the E8M0 exponent.
    clip: `mse` searches for the scale with the least squared error.
    tensor_scale: nvfp4's fp32 scale, per tensor, per token, or `fixed` (1.0, not stored);
        `fixed_floor` is `fixed` with block scales of at least 2^-9, so that tiny blocks do not
        become zeros.
    """

    name: str
    family: Family
    bits: int
    block: int | None
    scale: ScaleFormat
    exponent: ExponentRule = "floor"
    clip: ClipRule = "none"
    tensor_scale: TensorScale = "none"

    @property
    def element(self) -> Element:
        """The element of a block format; LoraqError for a 16-bit float."""
        element = FORMATS[self.name].element
        if element is None:
            raise LoraqError(f"Format '{self.name}' has no block element; it is a 16-bit float.")
        return element

    @property
    def per_token(self) -> bool:
        """Whether every scale belongs to one token, as activations require."""
        return self.block != -1 and self.tensor_scale != "tensor"

    @property
    def label(self) -> str:
        """Short name for tables: 'int4 g64', 'mxfp4_e2m1 ceil', 'int8 channel'."""
        spec, words = FORMATS[self.name], [self.name]
        if self.family in ("int", "uint") or self.block != spec.block:
            words.append({None: "channel", -1: "tensor"}.get(self.block, f"g{self.block}"))
        if self.scale != spec.scales[0]:
            words.append(self.scale)
        if self.exponent != "floor":
            words.append(self.exponent)
        if self.tensor_scale in ("token", "fixed", "fixed_floor"):
            words.append(self.tensor_scale)
        if self.clip != "none":
            words.append(f"clip-{self.clip}")
        return words[0] if self.family == "float" else " ".join(words)


def get_format(
    name: str,
    block: int | BlockName | None = None,
    scale: ScaleFormat | None = None,
    exponent: ExponentRule | None = None,
    clip: ClipRule | None = None,
    tensor_scale: TensorScale | None = None,
) -> Format:
    """The format `name` with options; None keeps the table's default.

    block: a positive integer, 'channel' or 'token' (the complete last axis), 'tensor' or -1.
    Raises LoraqError for an unknown name or value, and for an option without effect.
    """
    if name not in FORMATS:
        raise unknown("format", name, FORMATS)
    spec = FORMATS[name]
    chosen_scale = _choose(name, "scale", scale, spec.scales)
    rules: Sequence[ExponentRule] = EXPONENT_RULES if chosen_scale == "e8m0" else ("floor",)
    clips: Sequence[ClipRule] = CLIP_RULES if spec.family != "float" else ("none",)
    tensor_scales: Sequence[TensorScale] = TENSOR_SCALES if spec.family == "nvfp" else ("none",)
    return Format(
        name=name,
        family=spec.family,
        bits=spec.bits,
        block=_choose_block(name, spec, block),
        scale=chosen_scale,
        exponent=_choose(name, "exponent", exponent, rules),
        clip=_choose(name, "clip", clip, clips),
        tensor_scale=_choose(name, "tensor_scale", tensor_scale, tensor_scales),
    )


def _choose(name: str, option: str, value: Choice | None, allowed: Sequence[Choice]) -> Choice:
    if value is None:
        return allowed[0]
    if value not in allowed:
        raise LoraqError(
            f"Format '{name}' does not support {option}={value!r}. "
            f"Choose {' or '.join(repr(a) for a in allowed)}, or leave it out."
        )
    return value


def _choose_block(name: str, spec: FormatSpec, block: int | str | None) -> int | None:
    if block is None:
        return spec.block
    if spec.family == "float":
        raise LoraqError(f"Format '{name}' has no scale, so block={block!r} has no effect.")
    if block in FULL_AXIS:
        return None
    if block in ("tensor", -1) and spec.family in ("int", "uint"):
        return -1
    if isinstance(block, bool) or not isinstance(block, int) or block < 1:
        words = "'channel'" + (" or 'tensor'" if spec.family in ("int", "uint") else "")
        raise LoraqError(
            f"Format '{name}' does not support block={block!r}. "
            f"Set an integer of at least 1 (default {spec.block}) or {words}."
        )
    return block
