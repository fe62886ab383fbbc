"""The recipe of a quantisation: four formats, transform × branch × rounding, allocation."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from loraq.config.recipe_parts import (
    AllocationConfig,
    BranchConfig,
    FormatConfig,
    RoundingConfig,
    TransformConfig,
)
from loraq.config.validation import LARGEST_SEED, Checked, setting
from loraq.errors import LoraqError
from loraq.formats import Format
from loraq.formats.table import FORMATS
from loraq.utils.plain import to_plain
from loraq.utils.user_module import is_user_file, user_file_label

OPERANDS = ("weight", "activation", "branch_weight", "branch_activation")


@dataclass(frozen=True, repr=False)
class Recipe(Checked):
    """The settings of one quantisation: four formats and one of transform × branch × rounding.

    skip: roles or globs on layer names that stay in 16 bits; None is the model family's list.
    statistics: source of the inputs' second moments (balanced smoothing, weighted branches, GPTQ):
        calibration `activations`, or the model's `weights` (`loraq/models/moments.py`). Layers
        whose inputs the weights do not determine use no second moments.
    sixteen_bit: the type of 16-bit scales and branches: that of each `format`, or the `model`'s.
    """

    weight: FormatConfig = FormatConfig("int4")
    activation: FormatConfig = FormatConfig("int4")
    branch_weight: FormatConfig = FormatConfig("int8")
    branch_activation: FormatConfig = FormatConfig("int8")
    transform: TransformConfig = TransformConfig()
    branch: BranchConfig = BranchConfig()
    rounding: RoundingConfig = RoundingConfig()
    requantize_intermediate: bool = True
    skip: tuple[str, ...] | None = None
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED)
    statistics: Literal["activations", "weights"] = setting("activations", since="0.2")
    allocation: AllocationConfig = setting(AllocationConfig(), since="0.2")
    sixteen_bit: Literal["format", "model"] = setting("format", since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform.shift and self.activation.name != "int4":
            raise LoraqError(
                f"quant.transform.shift=true needs unsigned 4-bit codes, and the activations are "
                f"{self.activation.name}. Set quant.transform.shift=false, or use "
                "format@quant.activation=int4."
            )
        if self.statistics == "weights":
            self._check_statistics()
        if self.allocation.kind != "uniform" and self.branch.kind == "none":
            raise LoraqError(
                f"quant.allocation.kind={self.allocation.kind} distributes the branch's memory, "
                "and this recipe has no low-rank branch. Use a method with a branch, or set "
                "quant.allocation.kind=uniform."
            )
        by_bits, four = self.allocation.kind in ("bits", "both"), {"int4", "mxint4"}
        if by_bits and not {self.weight.name, self.activation.name} <= four:
            raise LoraqError(
                f"quant.allocation.kind={self.allocation.kind} chooses between 4 and 8 bits of one "
                f"family, and the weights are {self.weight.name}, the activations "
                f"{self.activation.name}. Use int4 or mxint4 for both."
            )
        if self.rounding.kind == "gptq" and self.weight.name in ("bf16", "fp16"):
            raise LoraqError(
                f"quant.rounding.kind=gptq has no effect on weights in {self.weight.name}. Choose "
                "a format of fewer bits (format@quant.weight=int4), or quant.rounding.kind=nearest."
            )

    def _check_statistics(self) -> None:
        if not self.reads_moments:
            raise LoraqError(
                "quant.statistics=weights has no effect: this recipe reads no second moments. Set "
                "quant.transform.smooth=balanced, quant.rounding.kind=gptq or "
                "quant.branch.weighting=diagonal | full, or leave it out."
            )
        if self.needs_rows:
            raise LoraqError(
                "quant.statistics=weights gives only second moments, and this recipe also reads "
                "rows of activations (transform.smooth=search | fixed, branch.select=output, or "
                "branch.weighting=magnitude). Choose others, or quant.statistics=activations."
            )

    def formats(self) -> dict[str, Format]:
        """The formats of the four operands by name; LoraqError names an invalid operand."""
        if self.sixteen_bit == "model":
            raise LoraqError(
                "quant.sixteen_bit=model: the model's type is not known here. Call "
                "recipe.for_model('bfloat16' or 'float16') first."
            )
        built = {}
        for operand in OPERANDS:
            entry: FormatConfig = getattr(self, operand)
            try:
                activation = operand.endswith("activation")
                built[operand] = entry.build_activation() if activation else entry.build()
            except LoraqError as error:
                raise LoraqError(f"quant.{operand}: {error}") from None
        return built

    def for_model(self, dtype: str) -> Recipe:
        """The recipe with `sixteen_bit=model` replaced by the formats that it means.

        dtype: the model's; 16-bit numbers of a float32 model stay as the formats say.
        """
        if self.sixteen_bit == "format":
            return self
        chosen = {"bfloat16": "bf16", "float16": "fp16"}.get(dtype, "")
        changed: dict[str, Any] = {"sixteen_bit": "format"}
        for operand in OPERANDS if chosen else ():
            entry: FormatConfig = getattr(self, operand)
            if entry.name in ("bf16", "fp16"):
                changed[operand] = dataclasses.replace(entry, name=chosen)
            elif entry.name in FORMATS and chosen in FORMATS[entry.name].scales:
                changed[operand] = dataclasses.replace(entry, scale=chosen)
        return dataclasses.replace(self, **changed)

    @property
    def needs_rows(self) -> bool:
        """Whether quantising reads rows of activations (smoothing, selection by output error)."""
        searching = self.branch.kind != "none" and self.branch.select == "output"
        by_magnitude = self.branch.weighting == "magnitude"
        smoothing = self.transform.smooth in ("search", "fixed")
        return smoothing or searching or by_magnitude

    @property
    def reads_moments(self) -> bool:
        """Whether quantising reads second moments (balanced smoothing, GPTQ, weighted branches)."""
        weighted = self.branch.kind != "none" and self.branch.weighting in ("diagonal", "full")
        balanced = self.transform.smooth == "balanced"
        return balanced or self.rounding.reads_moments or weighted

    @property
    def needs_moments(self) -> bool:
        """Whether quantising reads second moments measured on calibration activations."""
        return self.reads_moments and self.statistics == "activations"

    def without_moments(self) -> Recipe:
        """The recipe for layers whose inputs have no known second moments."""
        transform, branch = self.transform, self.branch
        if transform.smooth == "balanced":
            transform = dataclasses.replace(transform, smooth="none")
        if branch.weighting in ("diagonal", "full"):
            branch = dataclasses.replace(branch, weighting="none")
        return dataclasses.replace(
            self,
            transform=transform,
            branch=branch,
            rounding=RoundingConfig() if self.rounding.reads_moments else self.rounding,
            statistics="activations",
        )

    @property
    def needs_sensitivity(self) -> bool:
        """Whether ranks or bits depend on each layer's measured effect on the output."""
        return self.allocation.kind != "uniform" and self.allocation.sensitivity == "activations"

    @property
    def needs_calibration(self) -> bool:
        """Whether quantising reads activations; a data-free recipe reads only weights."""
        return self.needs_rows or self.needs_moments or self.needs_sensitivity

    def identity(self) -> dict[str, Any]:
        """The settings that determine the packed layers: formats resolved, no unused settings."""
        plain = to_plain(self, new_defaults=False)
        for operand, fmt in self.formats().items():
            plain[operand] = dataclasses.asdict(fmt)
        if self.branch.kind == "none":
            for name in ("branch", "branch_weight", "branch_activation", "requantize_intermediate"):
                plain.pop(name)
        elif self.branch.rank is not None or self.branch.budget_rank is not None:
            plain["branch"]["budget"] = None
        if is_user_file(self.branch.kind):
            plain["branch"]["kind"] = user_file_label(self.branch.kind)
        return plain
