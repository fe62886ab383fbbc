"""A recipe: how one set of layers is quantised. Formats, transform × branch × rounding, ranks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from loraq.config.validation import Checked, choice, setting
from loraq.errors import LoraqError
from loraq.formats import Format, get_format
from loraq.utils.plain import to_plain
from loraq.utils.user_module import is_own_file, label

ANY_BRANCH = ("svd", "alternating", "loraq")


@dataclass(frozen=True)
class FormatConfig(Checked):
    """What one operand's numbers can be; None means the default in the table of formats."""

    name: str
    block: int | str | None = None
    scale: str | None = None
    exponent: str | None = None
    clip: str | None = None
    tensor_scale: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.block, int) and self.block < 1 and self.block != -1:
            raise LoraqError(
                f"block={self.block} is no group size: the limit is 1 value per scale. "
                "Give 1 or more (64 is common for integers), -1 for one scale per tensor, "
                "or leave it out for the format's own."
            )

    def build(self) -> Format:
        """The format itself, with the table's defaults where nothing is set."""
        options = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name != "name" and getattr(self, entry.name) is not None
        }
        return get_format(self.name, **options)

    def build_activation(self) -> Format:
        """As `build`, for activations: every scale belongs to one token.

        A scale over the whole tensor would make an image depend on its neighbours in the batch.
        """
        per_token = self
        if self.name == "nvfp4" and self.tensor_scale is None:
            per_token = dataclasses.replace(self, tensor_scale="token")
        fmt = per_token.build()
        if not fmt.per_token:
            raise LoraqError(
                f"{fmt.label}: one scale for the whole tensor would make an image depend on its "
                "neighbours in the batch. Give activations block=token or a group size"
                + (" (nvfp4: tensor_scale=token or fixed)." if fmt.family == "nvfp" else ".")
            )
        return fmt


@dataclass(frozen=True)
class TransformConfig(Checked):
    """Exact re-parametrisations of (x, W): smoothing, block Hadamard, shift of the GELU output.

    smooth: `search` is SVDQuant's grid, `fixed` SmoothQuant's xmax^m / wmax^(1−m), m = `migration`;
        `balanced` is √(rms x / ‖w‖) per channel.
    shift and hadamard together: the layers that follow a GELU are shifted, all others rotated.
    """

    smooth: str = choice("none", "search", "fixed", "balanced")
    hadamard: int = 0
    shift: bool = False
    migration: float = setting(0.5, above=0, below=1, only_for=("fixed",), since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("smooth", "quant.transform")
        if self.hadamard == 1 or self.hadamard < 0 or (self.hadamard & (self.hadamard - 1)):
            raise LoraqError(
                f"hadamard={self.hadamard} is no power of two from 2 on. Give 0 for none, or 16, "
                "32, 64 … (a width's largest power of two where that is smaller)."
            )


@dataclass(frozen=True)
class BranchConfig(Checked):
    """How the low-rank factors are found, and how large they may be (rank, or else budget).

    kind: a module of `loraq/branches/`, or the path of a file with a `find` of the user's own.
    weighting: errors are measured in the weight (`none`), or scaled by each input channel's mean
        |x| (`magnitude`: L²QER) or rms (`diagonal`: QERA-approx), or by the inputs' second moment
        (`full`: QERA-exact, CALDERA).
    split: the start's singular values go to L with this exponent and to R with the rest.
    gradient: how Adam sees Q(W − P): held constant (`stop`), or through a soft rounding (`soft`).
    """

    kind: str = choice("none", *ANY_BRANCH, own_file=True)
    objective: str = choice("shape", "compensate", only_for=ANY_BRANCH)
    start: str = choice("weight", "error", "zero", only_for=ANY_BRANCH)
    rank: int | None = setting(None, at_least=1, only_for=ANY_BRANCH)
    budget: float | None = setting(0.64, above=0)
    share_qkv: bool = True
    solver: str = choice("alternation", "adam", only_for=("loraq",))
    steps: int = setting(100, at_least=1, only_for=("alternating", "loraq"))
    tolerance: float = setting(1e-4, above=0, only_for=("alternating", "loraq"))
    learning_rate: float = setting(1e-2, above=0, only_for=("loraq",))
    rotation: str = choice("none", "random", "learned", only_for=("loraq",))
    select: str = choice("weight", "output", only_for=("alternating",))
    weighting: str = choice(
        "none", "magnitude", "diagonal", "full", only_for=("svd", "loraq"), since="0.2"
    )
    split: float = setting(0.5, at_least=0, only_for=("svd", "loraq"), since="0.2")
    gradient: str = choice("stop", "soft", only_for=("loraq",), since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("kind", "quant.branch")
        if self.kind != "none" and self.rank is None and self.budget is None:
            raise LoraqError(
                "A branch needs a rank or a budget (bits per weight of the quantised set). "
                "Set quant.branch.budget=0.64 or quant.branch.rank=R."
            )
        if self.split > 1:
            raise LoraqError(f"split={self.split} is above the limit 1. Give 0 … 1.")
        if self.gradient == "soft" and (self.solver, self.objective) != ("adam", "shape"):
            raise LoraqError(
                "gradient=soft has an effect only with solver=adam and objective=shape. Set "
                "quant.branch.solver=adam, or leave it out."
            )
        if not is_own_file(self.kind):
            self._refuse_unread()

    def _refuse_unread(self) -> None:
        """LoraqError for a setting that another one keeps from being read."""
        adam = self.solver == "adam"
        unread = (
            ("learning_rate", not adam, "solver=adam"),
            ("tolerance", self.select == "output", "select=weight"),
            ("split", adam and self.start == "zero", "start=weight or start=error"),
            ("budget", self.rank is not None and self.budget is not None, "rank=null"),
        )
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name, idle, remedy in unread:
            value = getattr(self, name)
            if idle and value != defaults[name]:
                raise LoraqError(
                    f"quant.branch.{name}={value} has no effect here, only with {remedy}. Leave it "
                    f"out, or set quant.branch.{remedy}."
                )


@dataclass(frozen=True)
class RoundingConfig(Checked):
    """How what is left of the weight is rounded: `nearest`, or `gptq` (arXiv 2210.17323).

    damp: added to the inputs' second moment, relative to its mean diagonal.
    block: columns whose feedback is applied at once (no effect on the result beyond last bits).
    act_order: columns in the order of falling activation energy.
    """

    kind: str = choice("nearest", "gptq")
    damp: float = setting(0.01, above=0, only_for=("gptq",), since="0.2")
    block: int = setting(128, at_least=1, only_for=("gptq",), since="0.2")
    act_order: bool = setting(False, only_for=("gptq",), since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("kind", "quant.rounding")


@dataclass(frozen=True)
class AllocationConfig(Checked):
    """Who gets how much of one memory budget: the same for all, or by sensitivity.

    kind: `uniform`; `rank` gives each unit its own rank; `bits` 4 or 8 bits (weights and
        activations) under a uniform rank's memory; `both` chooses both together.
    sensitivity: how much a layer's error matters: `weights` counts relative errors alike
        (data-free), `activations` measures each layer's effect on the transformer's output, on
        images that the 16-bit model generates from the calibration captions.
    The budget is what the uniform recipe stores: equal memory by construction.
    """

    kind: str = choice("uniform", "rank", "bits", "both")
    sensitivity: str = choice("weights", "activations", only_for=("rank", "bits", "both"))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_idle("kind", "quant.allocation")


@dataclass(frozen=True)
class Recipe(Checked):
    """One quantisation: four formats and a point on transform × branch × rounding.

    `skip`: roles or globs on layer names that stay in 16 bits; None is the model family's own list.
    `statistics`: where the inputs' second moments come from (balanced smoothing, weighted branches,
        GPTQ): calibration `activations`, or the model's own `weights`, for the layers of which they
        tell something (`models/analytic.py`); the others do without.
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
    seed: int = 0
    statistics: str = choice("activations", "weights", since="0.2")
    allocation: AllocationConfig = field(
        default_factory=AllocationConfig, metadata={"since": "0.2"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform.shift and self.activation.name != "int4":
            raise LoraqError(
                f"quant.transform.shift=true pairs with unsigned 4-bit codes, and the activations "
                f"are {self.activation.name}. Set quant.transform.shift=false, or use "
                "format@quant.activation=int4."
            )
        if self.statistics == "weights":
            self._check_statistics()
        if self.allocation.kind != "uniform" and self.branch.kind == "none":
            raise LoraqError(
                f"quant.allocation.kind={self.allocation.kind} gives out the branch's memory, and "
                "this recipe has no low-rank branch. Take a method with one, or "
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
                "quant.statistics=weights has no effect: nothing here reads second moments. Set "
                "quant.transform.smooth=balanced, quant.rounding.kind=gptq or "
                "quant.branch.weighting=diagonal | full, or leave it out."
            )
        if self.needs_rows:
            raise LoraqError(
                "quant.statistics=weights gives second moments, and this recipe also reads rows of "
                "activations (transform.smooth=search | fixed, branch.select=output, or "
                "branch.weighting=magnitude). Choose others, or quant.statistics=activations."
            )

    def formats(self) -> dict[str, Format]:
        """The four operands' formats by name; LoraqError names the operand that cannot be."""
        built = {}
        for operand in ("weight", "activation", "branch_weight", "branch_activation"):
            entry: FormatConfig = getattr(self, operand)
            try:
                activation = operand.endswith("activation")
                built[operand] = entry.build_activation() if activation else entry.build()
            except LoraqError as error:
                raise LoraqError(f"quant.{operand}: {error}") from None
        return built

    @property
    def needs_rows(self) -> bool:
        """Whether quantising reads rows of activations (smoothing, choosing by output error)."""
        searching = self.branch.kind != "none" and self.branch.select == "output"
        by_magnitude = self.branch.weighting == "magnitude"
        smoothing = self.transform.smooth in ("search", "fixed")
        return smoothing or searching or by_magnitude

    @property
    def reads_moments(self) -> bool:
        """Whether quantising reads second moments (balanced smoothing, GPTQ, weighted branches)."""
        weighted = self.branch.kind != "none" and self.branch.weighting in ("diagonal", "full")
        balanced = self.transform.smooth == "balanced"
        return balanced or self.rounding.kind == "gptq" or weighted

    @property
    def needs_moments(self) -> bool:
        """Whether they are measured: a data-free recipe takes them from the model's weights."""
        return self.reads_moments and self.statistics == "activations"

    def without_moments(self) -> Recipe:
        """The recipe for layers of whose inputs nothing is known."""
        transform, branch = self.transform, self.branch
        if transform.smooth == "balanced":
            transform = dataclasses.replace(transform, smooth="none")
        if branch.weighting in ("diagonal", "full"):
            branch = dataclasses.replace(branch, weighting="none")
        return dataclasses.replace(
            self,
            transform=transform,
            branch=branch,
            rounding=RoundingConfig(),
            statistics="activations",
        )

    @property
    def needs_sensitivity(self) -> bool:
        """Whether ranks or bits follow from each layer's measured effect on the output."""
        return self.allocation.kind != "uniform" and self.allocation.sensitivity == "activations"

    @property
    def needs_calibration(self) -> bool:
        """Whether quantising reads activations at all (a data-free recipe reads weights alone)."""
        return self.needs_rows or self.needs_moments or self.needs_sensitivity

    def identity(self) -> dict[str, Any]:
        """What the packed layers follow from: formats resolved, without settings of no effect."""
        plain = to_plain(self, new_defaults=False)
        for operand, fmt in self.formats().items():
            plain[operand] = dataclasses.asdict(fmt)
        if self.branch.kind == "none":
            for name in ("branch", "branch_weight", "branch_activation", "requantize_intermediate"):
                plain.pop(name)
        elif self.branch.rank is not None:
            plain["branch"]["budget"] = None
        if is_own_file(self.branch.kind):
            plain["branch"]["kind"] = label(self.branch.kind)
        return plain
