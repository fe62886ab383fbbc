"""The schema: frozen dataclasses, each checked as it is made.

YAML (`conf/`) holds values, this file holds names, types and limits; `door.py` converts one into
the other. Every error names the key as it is written on the command line.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from loraq.errors import LoraqError, unknown

if TYPE_CHECKING:
    from loraq.formats import Format

CHOICES: dict[str, tuple[str, ...]] = {
    "TransformConfig.smooth": ("none", "search"),
    "BranchConfig.kind": ("none", "svd", "alternating", "loraq"),
    "BranchConfig.objective": ("shape", "compensate"),
    "BranchConfig.start": ("weight", "error", "zero"),
    "BranchConfig.solver": ("alternation", "adam"),
    "BranchConfig.rotation": ("none", "random"),
    "BranchConfig.select": ("weight", "output"),
    "RoundingConfig.kind": ("nearest",),
    "ModelConfig.dtype": ("float32", "bfloat16", "float16"),
    "TrackingConfig.mode": ("offline", "online", "disabled"),
    "MetricsConfig.extractor": ("auto", "efflite0", "inception"),
    "Config.device": ("auto", "cpu", "cuda"),
}
AT_LEAST: dict[str, float] = {
    "BranchConfig.rank": 1,
    "BranchConfig.steps": 1,
    "ModelConfig.height": 8,
    "ModelConfig.width": 8,
    "ModelConfig.steps": 1,
    "ModelConfig.guidance": 0,
    "ModelConfig.max_sequence_length": 1,
    "CalibrationConfig.prompts": 1,
    "CalibrationConfig.measure_prompts": 1,
    "CalibrationConfig.rows_per_layer": 1,
    "DataConfig.count": 1,
    "GenerateConfig.batch_size": 1,
    "MetricsConfig.bootstrap": 100,
    "Config.threads": 1,
}
ABOVE_ZERO = ("BranchConfig.budget", "BranchConfig.tolerance", "BranchConfig.learning_rate")


BRANCH_SETTINGS: dict[str, tuple[str, ...]] = {
    "objective": ("svd", "alternating", "loraq"),
    "start": ("svd", "alternating", "loraq"),
    "rank": ("svd", "alternating", "loraq"),
    "solver": ("loraq",),
    "steps": ("alternating", "loraq"),
    "tolerance": ("alternating", "loraq"),
    "learning_rate": ("loraq",),
    "rotation": ("loraq",),
    "select": ("alternating",),
}
"""The kinds of branch that read a setting; elsewhere it would have no effect and is refused."""


class _Checked:
    """Checks the plain limits of every dataclass below as it is made."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            key = f"{type(self).__name__}.{entry.name}"
            value = getattr(self, entry.name)
            if key in CHOICES and value not in CHOICES[key]:
                raise LoraqError(f"{entry.name}: {unknown(entry.name, value, CHOICES[key])}")
            if value is None:
                continue
            if key in AT_LEAST and value < AT_LEAST[key]:
                raise LoraqError(
                    f"{entry.name}={value} is below the limit {AT_LEAST[key]:g}. "
                    f"Give {AT_LEAST[key]:g} or more."
                )
            if key in ABOVE_ZERO and not value > 0:
                raise LoraqError(f"{entry.name}={value} must be above 0. Give a positive number.")


@dataclass(frozen=True)
class FormatConfig(_Checked):
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
        from loraq.formats import get_format

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
class TransformConfig(_Checked):
    """Exact re-parametrisations of (x, W): smoothing, block Hadamard, shift of the GELU output."""

    smooth: str = "none"
    hadamard: int = 0
    shift: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.hadamard < 0 or (self.hadamard & (self.hadamard - 1)):
            raise LoraqError(
                f"hadamard={self.hadamard} is not a power of two. Give 0 for none, or 16, 32, 64 …"
            )
        if self.shift and self.hadamard:
            raise LoraqError(
                "shift=true does not go together with hadamard: the rotated input is no longer "
                "bounded below. Set quant.transform.shift=false or quant.transform.hadamard=0."
            )


@dataclass(frozen=True)
class BranchConfig(_Checked):
    """How the low-rank factors are found, and how large they may be (rank, or else budget)."""

    kind: str = "none"
    objective: str = "shape"
    start: str = "weight"
    rank: int | None = None
    budget: float | None = 0.64
    share_qkv: bool = True
    solver: str = "alternation"
    steps: int = 100
    tolerance: float = 1e-4
    learning_rate: float = 1e-2
    rotation: str = "none"
    select: str = "weight"

    def __post_init__(self) -> None:
        super().__post_init__()
        for entry in dataclasses.fields(self):
            reach = BRANCH_SETTINGS.get(entry.name)
            value = getattr(self, entry.name)
            if reach is not None and self.kind not in reach and value != entry.default:
                raise LoraqError(
                    f"{entry.name}={value} has no effect with kind={self.kind}, only with "
                    f"{' or '.join(reach)}. Leave it out, or set quant.branch.kind."
                )
        if self.kind != "none" and self.rank is None and self.budget is None:
            raise LoraqError(
                "A branch needs a rank or a budget (bits per weight of the quantised set). "
                "Set quant.branch.budget=0.64 or quant.branch.rank=R."
            )


@dataclass(frozen=True)
class RoundingConfig(_Checked):
    """How what is left of the weight is rounded."""

    kind: str = "nearest"


@dataclass(frozen=True)
class Recipe(_Checked):
    """One quantisation: four formats and a point on transform × branch × rounding.

    `skip`: roles or globs on layer names that stay in 16 bits; None is the model family's own list.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.transform.shift and self.activation.name != "int4":
            raise LoraqError(
                f"quant.transform.shift=true pairs with unsigned 4-bit codes, and the activations "
                f"are {self.activation.name}. Set quant.transform.shift=false, or use "
                "format@quant.activation=int4."
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
    def needs_calibration(self) -> bool:
        """Whether quantising reads activations (a data-free recipe reads weights alone)."""
        searching = self.branch.kind != "none" and self.branch.select == "output"
        return self.transform.smooth != "none" or searching


@dataclass(frozen=True)
class ModelConfig(_Checked):
    """A pipeline in `save_pretrained` layout (a folder, or a hub id) and how it is sampled."""

    name: str = "tiny_pixart"
    family: str = "pixart_sigma"
    path: str | None = None
    hub_id: str | None = None
    dtype: str = "float32"
    height: int = 128
    width: int = 128
    steps: int = 20
    guidance: float = 4.5
    max_sequence_length: int = 300
    call: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.hub_id is None):
            raise LoraqError(
                f"Model '{self.name}' has path={self.path} and hub_id={self.hub_id}: it needs "
                "exactly one of them. Set model.path=FOLDER (asset:NAME for one of the package's) "
                "or model.hub_id=OWNER/NAME, and the other to null."
            )


@dataclass(frozen=True)
class CalibrationConfig(_Checked):
    """Captions whose activations methods may read, and those kept for measuring output errors.

    Calibration takes the first `prompts` of the split, measuring the last `measure_prompts`.
    """

    split: str = "calibration"
    prompts: int = 32
    measure_prompts: int = 16
    rows_per_layer: int = 2048
    seed: int = 0


@dataclass(frozen=True)
class DataConfig(_Checked):
    """Which prompts are generated: the first `count` of a split of the captions file.

    `real`: the real images of these prompts, for Fréchet and kernel distances: a folder of
    NAME.png, or a file of their features.
    """

    captions: str = "asset:captions.json"
    split: str = "test"
    count: int | None = 32
    real: str | None = None


@dataclass(frozen=True)
class GenerateConfig(_Checked):
    """Batch size (the unit of resume) and the seed that joins each image's own."""

    batch_size: int = 8
    seed: int = 0


@dataclass(frozen=True)
class MetricsConfig(_Checked):
    """What is measured and with which feature extractor."""

    names: tuple[str, ...] = ("psnr", "lpips", "ssim", "frechet", "kid", "alignment")
    extractor: str = "auto"
    bootstrap: int = 2000


@dataclass(frozen=True)
class TrackingConfig(_Checked):
    """Where the finished record is shown: W&B offline, online or not at all."""

    mode: str = "offline"
    project: str = "loraq"


@dataclass(frozen=True)
class Config(_Checked):
    """One row: a model, a recipe (None = the 16-bit reference) and how it is judged.

    `baseline` names the row that the experiment's table compares the others with.
    """

    model: ModelConfig
    method: str
    quant: Recipe | None
    data: DataConfig = DataConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    generate: GenerateConfig = GenerateConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracking: TrackingConfig = TrackingConfig()
    experiment: str = "single"
    baseline: str | None = None
    row: str | None = None
    label: str | None = None
    device: str = "auto"
    threads: int | None = None
    output: str = "outputs"
