"""A run: model, prompts, metrics, tracking. One `Config` is one row of an experiment."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any, Literal, get_args

from loraq.config.recipe import Recipe
from loraq.config.validation import LARGEST_SEED, Checked, choices, setting
from loraq.errors import LoraqError, unknown

Analysis = Literal["limits", "steps", "losses"]
ExtractorChoice = Literal["auto", "efflite0", "inception"]
LARGEST_SET = 10_000_000
"""Limit of numbers of prompts and of rows of activations."""


@dataclass(frozen=True, kw_only=True, repr=False)
class ModelConfig(Checked):
    """A pipeline in `save_pretrained` layout (a folder or a hub id) and its sampling settings.

    revision: a commit, branch or tag of the hub's repository, null for its main branch. A branch is
        looked up when files are downloaded, and then stays what it was.
    variant: which weight files are read, such as `fp16` for `*.fp16.safetensors`; a component that
        has no such files is read from those without a variant, as in diffusers.
    fps: frames per second at which a video is kept, if the pipeline's call has no argument for it.
    domain: what the model draws, such as `photographs`. It is not measured against prompts, real
        images or networks that say another domain; None: any.
    dtypes: networks beside the denoiser that run in another dtype, `{vae: float32}`; the rule for
        those that are not named is in `loraq/models/dtypes.py`.
    Settings that depend on the model have no default: size, sampler settings, length of prompts.
    Those that are None, and a name or family `auto`, are read from the model's files when a run is
    composed (`loraq/models/defaults.py`); what is None then, the pipeline has no argument for.
    """

    name: str = setting(MISSING, names="label")
    family: str = "auto"
    path: str | None = None
    hub_id: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    height: int | None = setting(MISSING, at_least=8, at_most=16_384)
    width: int | None = setting(MISSING, at_least=8, at_most=16_384)
    steps: int | None = setting(MISSING, at_least=1, at_most=1_000)
    guidance: float | None = setting(MISSING, at_least=0, at_most=1_000)
    max_sequence_length: int | None = setting(MISSING, at_least=1, at_most=8_192)
    call: dict[str, Any] = field(default_factory=dict)
    variant: str | None = setting(None, since="0.2")
    domain: str | None = setting(None, since="0.2")
    revision: str | None = setting(None, since="0.2")
    fps: float | None = setting(None, at_least=1, at_most=1_000, since="0.2")
    dtypes: dict[str, Any] = field(default_factory=dict, metadata={"since": "0.2"})

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, dtype in self.dtypes.items():
            if dtype not in choices(ModelConfig)["dtype"]:
                problem = unknown("dtype", str(dtype), choices(ModelConfig)["dtype"])
                raise LoraqError(f"model.dtypes.{name}: {problem}")
        if (self.path is None) == (self.hub_id is None):
            raise LoraqError(
                f"model.path={self.path or 'null'} and model.hub_id={self.hub_id or 'null'}: "
                "exactly one must be set. Set model.path=FOLDER (asset:NAME for a model in the "
                "package) or model.hub_id=OWNER/NAME, and the other to null."
            )
        if self.revision is not None and self.hub_id is None:
            raise LoraqError(
                f"revision={self.revision} has no effect with path={self.path}, only with hub_id. "
                "Set model.revision=null."
            )

    @property
    def guided(self) -> bool:
        """Whether the guidance asks for a second forward on an empty or negative prompt."""
        return self.guidance is not None and self.guidance > 1

    @property
    def step_count(self) -> int:
        """The denoising steps, once they are filled in."""
        assert self.steps is not None
        return self.steps

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None if the pipeline has no such arguments (audio)."""
        return None if self.height is None or self.width is None else (self.height, self.width)


@dataclass(frozen=True, repr=False)
class CalibrationConfig(Checked):
    """Prompts for calibration and prompts for measuring output errors; the two do not overlap.

    Calibration reads the first `prompts`, measuring the last `measure_prompts`. Both are taken from
    `captions` (read as the set `set`) if given; else from the data's split `split`, or, for a
    published set, from the prompts that the run does not generate.
    `text=random`: calibration reads random tokens of the model's vocabulary (data-free).
    """

    split: str = "calibration"
    prompts: int = setting(32, at_least=1, at_most=LARGEST_SET)
    measure_prompts: int = setting(16, at_least=1, at_most=LARGEST_SET)
    rows_per_layer: int = setting(2048, at_least=1, at_most=LARGEST_SET)
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED)
    text: Literal["captions", "random"] = setting("captions", since="0.1")
    captions: str | None = setting(None, since="0.2")
    set: str = setting("captions", since="0.2")


@dataclass(frozen=True, repr=False)
class DataConfig(Checked):
    """The prompts that are generated: `count` of them, None for all.

    set: how `captions` is read (`loraq/data/sets.py`): `captions`, a JSON file with splits, takes
        its first prompts; a published set in its folder takes the SVDQuant reference's subset
        (shuffled by `random.Random(0)`, cut, sorted); `file`, a user's list, takes its first.
    real: the real images of these prompts, for Fréchet and kernel distances: a folder of NAME.png,
        a file of their features, or `set` for the images of the prompt set.
    domain: what prompts and real images show, such as `emoji`; None: anything.
    """

    set: str = setting("captions", since="0.2")
    captions: str | None = "asset:captions.json"
    split: str = "test"
    count: int | None = setting(32, at_least=1, at_most=LARGEST_SET)
    real: str | None = None
    domain: str | None = setting(None, since="0.2")


@dataclass(frozen=True, repr=False)
class GenerateConfig(Checked):
    """Batch size (a run resumes at a batch) and the seed that is combined with each image's."""

    batch_size: int = setting(16, at_least=1, at_most=4_096)
    seed: int = setting(0, at_least=0, at_most=LARGEST_SEED)


@dataclass(frozen=True, repr=False)
class MetricsConfig(Checked):
    """Metrics and their feature extractor; `workers`: threads that read images, 0: by the machine.

    analyses: in addition to metrics, `limits` (rate–distortion bounds of the weights), `steps` (the
        transformer's output error by denoising step and role), `losses` (the loss of every solver
        iteration).
    """

    names: tuple[str, ...] = ("psnr", "lpips", "ssim", "frechet", "kid", "alignment")
    extractor: ExtractorChoice = "auto"
    bootstrap: int = setting(2000, at_least=100, at_most=100_000)
    analyses: tuple[Analysis, ...] = ()
    workers: int = setting(0, at_least=0, at_most=256, since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.analyses:
            if name not in get_args(Analysis):
                raise LoraqError(f"analyses: {unknown('analysis', name, get_args(Analysis))}")


@dataclass(frozen=True, repr=False)
class TrackingConfig(Checked):
    """Whether W&B shows the finished record: offline, online or disabled."""

    mode: Literal["offline", "online", "disabled"] = "offline"
    project: str = setting("loraq", names="label")


@dataclass(frozen=True, repr=False)
class ExperimentRow(Checked):
    """A row as a file in `conf/experiment/` lists it."""

    name: str = setting(MISSING, names="file")
    label: str = setting(MISSING, names="label")
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, repr=False)
class Config(Checked):
    """One row: a model, a recipe (None: the 16-bit reference) and its evaluation.

    `baseline` names the row that the experiment's table compares the others with.
    """

    model: ModelConfig
    method: str = setting(MISSING, names="file")
    quant: Recipe | None
    data: DataConfig = DataConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    generate: GenerateConfig = GenerateConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracking: TrackingConfig = TrackingConfig()
    experiment: str = setting("single", names="file")
    baseline: str | None = None
    row: str | None = setting(None, names="file")
    label: str | None = setting(None, names="label")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = setting(None, at_least=1, at_most=1_024)
    compute: Literal["emulate", "auto", "triton"] = "emulate"
    output: str = "outputs"
