"""The parts of a recipe: formats, transform, branch, rounding, allocation. Each checks itself."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal, get_args

from loraq.config.validation import Checked, setting
from loraq.errors import LoraqError
from loraq.formats import Format, get_format

LowRankKind = Literal["svd", "alternating", "loraq"]

ANY_BRANCH = get_args(LowRankKind)
LARGEST_WIDTH = 2**20
"""Limit of sizes that count a layer's channels: ranks, groups, rotations."""


@dataclass(frozen=True, repr=False)
class FormatConfig(Checked):
    """The number format of one operand; None means the default in `loraq/formats/table.py`."""

    name: str
    block: int | str | None = setting(None, at_least=-1, at_most=LARGEST_WIDTH)
    scale: str | None = None
    exponent: str | None = None
    clip: str | None = None
    tensor_scale: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.block, int) and self.block < 1 and self.block != -1:
            raise LoraqError(
                f"block={self.block} is not a group size: the limit is 1 value per scale. "
                "Give 1 or more (64 is common for integers), -1 for one scale per tensor, "
                "or leave it out for the format's default."
            )

    def build(self) -> Format:
        """The `Format`, with the table's defaults for settings that are None."""
        options = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name != "name" and getattr(self, entry.name) is not None
        }
        return get_format(self.name, **options)

    def build_activation(self) -> Format:
        """Like `build`, for activations: every scale belongs to one token.

        With one scale per tensor an image would depend on the other images of its batch.
        """
        per_token = self
        if self.name == "nvfp4" and self.tensor_scale is None:
            per_token = dataclasses.replace(self, tensor_scale="token")
        fmt = per_token.build()
        if not fmt.per_token:
            raise LoraqError(
                f"{fmt.label}: with one scale per tensor an image would depend on the other images "
                "of its batch. Give activations block=token or a group size"
                + (
                    " (nvfp4: tensor_scale=token, fixed or fixed_floor)."
                    if fmt.family == "nvfp"
                    else "."
                )
            )
        return fmt


@dataclass(frozen=True, repr=False)
class TransformConfig(Checked):
    """Exact re-parametrisations of (x, W): smoothing, block Hadamard, shift of GELU outputs.

    smooth: per channel, `search` is SVDQuant's grid search, `fixed` SmoothQuant's
        xmax^m / wmax^(1−m) with m = `migration`, `balanced` is √(rms x / ‖w‖).
    shift and hadamard together: layers that follow a GELU are shifted, all others rotated.
    signs: of the rotation, `random`, or `regular`, with which it is a regular Hadamard matrix.
    """

    smooth: Literal["none", "search", "fixed", "balanced"] = "none"
    hadamard: int = setting(0, at_least=0, at_most=LARGEST_WIDTH)
    shift: bool = False
    migration: float = setting(0.5, above=0, below=1, only_for=("fixed",), since="0.2")
    signs: Literal["random", "regular"] = setting("random", since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_only_for("smooth", "quant.transform")
        if self.hadamard == 1 or self.hadamard & (self.hadamard - 1):
            raise LoraqError(
                f"hadamard={self.hadamard} is not a power of two ≥ 2. Give 0 for none, or 16, 32, "
                "64 … (limited to the largest power of two that divides the width)."
            )
        if self.signs != "random" and not self.hadamard:
            raise LoraqError(
                f"quant.transform.signs={self.signs} has no effect with hadamard=0. Set "
                "quant.transform.hadamard=64, for example, or leave signs out."
            )


@dataclass(frozen=True, repr=False)
class BranchConfig(Checked):
    """The low-rank branch: its solver and its size (`rank`, else `budget_rank`, else `budget`).

    budget_rank: the budget is the memory of a 16-bit branch of this rank in the same model.
    kind: a module of `loraq/branches/`, or the path of a user's file that defines `find`.
    weighting: errors are measured in the weight (`none`), scaled by each input channel's mean |x|
        (`magnitude`: L²QER) or rms (`diagonal`: QERA-approx), or weighted by the inputs' second
        moment (`full`: QERA-exact, CALDERA).
    split: L starts with the singular values to this power, R with the remaining power.
    gradient: Adam treats Q(W − P) as constant (`stop`) or differentiates a soft rounding (`soft`).
    """

    kind: Literal["none", LowRankKind] | str = setting(
        "none", user_file=True, modules=("branches", "find")
    )
    objective: Literal["shape", "compensate"] = setting("shape", only_for=ANY_BRANCH)
    start: Literal["weight", "error", "zero"] = setting("weight", only_for=ANY_BRANCH)
    rank: int | None = setting(None, at_least=1, at_most=LARGEST_WIDTH, only_for=ANY_BRANCH)
    budget: float | None = setting(0.64, above=0, at_most=32)
    share_qkv: bool = True
    solver: Literal["alternation", "adam"] = setting("alternation", only_for=("loraq",))
    steps: int = setting(100, at_least=1, at_most=100_000, only_for=("alternating", "loraq"))
    tolerance: float = setting(1e-4, above=0, below=1, only_for=("alternating", "loraq"))
    learning_rate: float = setting(1e-2, above=0, at_most=10, only_for=("loraq",))
    rotation: Literal["none", "random", "learned"] = setting("none", only_for=("loraq",))
    select: Literal["weight", "output"] = setting("weight", only_for=("alternating",))
    weighting: Literal["none", "magnitude", "diagonal", "full"] = setting(
        "none", only_for=("svd", "loraq"), since="0.2"
    )
    split: float = setting(0.5, at_least=0, at_most=1, only_for=("svd", "loraq"), since="0.2")
    gradient: Literal["stop", "soft"] = setting("stop", only_for=("loraq",), since="0.2")
    budget_rank: int | None = setting(
        None, at_least=1, at_most=LARGEST_WIDTH, only_for=ANY_BRANCH, since="0.2"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_only_for("kind", "quant.branch")
        sizes = (self.rank, self.budget_rank, self.budget)
        if self.kind != "none" and all(size is None for size in sizes):
            raise LoraqError(
                "A branch needs a rank or a budget (bits per weight of the quantised layers). "
                "Set quant.branch.budget=0.64 or quant.branch.rank=R."
            )
        if self.gradient == "soft" and (self.solver, self.objective) != ("adam", "shape"):
            raise LoraqError(
                "gradient=soft has an effect only with solver=adam and objective=shape. Set "
                "quant.branch.solver=adam, or leave gradient out."
            )
        if self.kind in ("none", *ANY_BRANCH):
            self._check_unused()

    def _check_unused(self) -> None:
        """LoraqError for a setting that has no effect because of another one."""
        adam = self.solver == "adam"
        unused = (
            ("learning_rate", not adam, "solver=adam"),
            ("tolerance", self.select == "output", "select=weight"),
            ("split", adam and self.start == "zero", "start=weight or start=error"),
            ("budget_rank", self.rank is not None, "rank=null"),
            ("budget", self.rank is not None and self.budget is not None, "rank=null"),
            (
                "budget",
                self.budget_rank is not None and self.budget is not None,
                "budget_rank=null",
            ),
        )
        defaults = {entry.name: entry.default for entry in dataclasses.fields(self)}
        for name, idle, remedy in unused:
            value = getattr(self, name)
            if idle and value != defaults[name]:
                raise LoraqError(
                    f"quant.branch.{name}={value} has no effect here, only with {remedy}. Leave it "
                    f"out, or set quant.branch.{remedy}."
                )


@dataclass(frozen=True, repr=False)
class RoundingConfig(Checked):
    """Rounding of the weight's residual: `nearest`, or `gptq` (arXiv 2210.17323).

    kind: a module of `loraq/rounding/`.
    damp: added to the diagonal of the inputs' second moment, relative to its mean.
    block: columns whose error feedback is applied together (changes the result in the last bits).
    act_order: columns in the order of descending second moment.
    """

    kind: Literal["nearest", "gptq"] | str = setting(
        "nearest", modules=("rounding", "round_weights")
    )
    damp: float = setting(0.01, above=0, at_most=10, only_for=("gptq",), since="0.2")
    block: int = setting(128, at_least=1, at_most=LARGEST_WIDTH, only_for=("gptq",), since="0.2")
    act_order: bool = setting(False, only_for=("gptq",), since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_only_for("kind", "quant.rounding")

    @property
    def reads_moments(self) -> bool:
        """Whether this rounding reads second moments of the layer's input."""
        return self.kind == "gptq"


@dataclass(frozen=True, repr=False)
class AllocationConfig(Checked):
    """Distribution of one memory budget over the layers: uniform, or by sensitivity.

    kind: `uniform`; `rank` chooses a rank per unit; `bits` chooses 4 or 8 bits (weights and
        activations) within a uniform rank's memory; `both` chooses rank and bits together.
    sensitivity: the weight of a layer's error: `weights` gives all relative errors the same weight
        (data-free), `activations` measures each layer's effect on the transformer's output, for
        images that the 16-bit model generates from the calibration captions.
    The budget is the memory of the uniform recipe, so that both use the same memory.
    """

    kind: Literal["uniform", "rank", "bits", "both"] = "uniform"
    sensitivity: Literal["weights", "activations"] = setting(
        "weights", only_for=("rank", "bits", "both")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_only_for("kind", "quant.allocation")
