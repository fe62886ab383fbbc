"""A run: the model, the prompts, what is measured, where it is shown. One `Config` is one row."""

from __future__ import annotations

from dataclasses import MISSING, dataclass, field
from typing import Any

from loraq.config.recipe import Recipe
from loraq.config.validation import Checked, choice, setting
from loraq.errors import LoraqError, unknown

ANALYSES = ("limits", "steps", "losses")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Checked):
    """A pipeline in `save_pretrained` layout (a folder, or a hub id) and how it is sampled.

    What differs from model to model has no default: size, sampler settings, length of prompts.
    """

    name: str
    family: str
    path: str | None = None
    hub_id: str | None = None
    dtype: str = choice("float32", "bfloat16", "float16")
    height: int = setting(MISSING, at_least=8)
    width: int = setting(MISSING, at_least=8)
    steps: int = setting(MISSING, at_least=1)
    guidance: float = setting(MISSING, at_least=0)
    max_sequence_length: int = setting(MISSING, at_least=1)
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
class CalibrationConfig(Checked):
    """Captions whose activations methods may read, and those kept for measuring output errors.

    Calibration takes the first `prompts`, measuring the last `measure_prompts`: of the data's split
    `split`; of `captions` (read as the set `set`), where that is given; else, for a published set,
    of what the run leaves of it.
    `text=random`: calibration reads random tokens of the model's own vocabulary instead, no data.
    """

    split: str = "calibration"
    prompts: int = setting(32, at_least=1)
    measure_prompts: int = setting(16, at_least=1)
    rows_per_layer: int = setting(2048, at_least=1)
    seed: int = 0
    text: str = choice("captions", "random", since="0.1")
    captions: str | None = setting(None, since="0.2")
    set: str = setting("captions", since="0.2")


@dataclass(frozen=True)
class DataConfig(Checked):
    """Which prompts are generated: `count` of them, None for all.

    set: how `captions` is read (`loraq/data/sets.py`): `captions`, our JSON file with splits, of
        which the first are taken; a published set in its folder, of which the SVDQuant reference's
        subset is taken (shuffled by `random.Random(0)`, cut, sorted); `file`, a list of your own.
    real: the real images of these prompts, for Fréchet and kernel distances: a folder of NAME.png,
        a file of their features, or `set`: the set's own.
    """

    set: str = setting("captions", since="0.2")
    captions: str | None = "asset:captions.json"
    split: str = "test"
    count: int | None = setting(32, at_least=1)
    real: str | None = None


@dataclass(frozen=True)
class GenerateConfig(Checked):
    """Batch size (the unit of resume) and the seed that joins each image's own."""

    batch_size: int = setting(16, at_least=1)
    seed: int = 0


@dataclass(frozen=True)
class MetricsConfig(Checked):
    """What is measured and with which feature extractor; `workers`: processes that read images.

    analyses: beside the metrics, `limits` (rate–distortion references of the weights), `steps` (the
        transformer's output error by denoising step and role), `losses` (of every solver's round).
    """

    names: tuple[str, ...] = ("psnr", "lpips", "ssim", "frechet", "kid", "alignment")
    extractor: str = choice("auto", "efflite0", "inception")
    bootstrap: int = setting(2000, at_least=100)
    analyses: tuple[str, ...] = ()
    workers: int = setting(0, at_least=0, since="0.2")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.analyses:
            if name not in ANALYSES:
                raise LoraqError(f"analyses: {unknown('analysis', name, ANALYSES)}")


@dataclass(frozen=True)
class TrackingConfig(Checked):
    """Where the finished record is shown: W&B offline, online or not at all."""

    mode: str = choice("offline", "online", "disabled")
    project: str = "loraq"


@dataclass(frozen=True)
class Config(Checked):
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
    device: str = choice("auto", "cpu", "cuda")
    threads: int | None = setting(None, at_least=1)
    compute: str = choice("emulate", "auto", "triton")
    output: str = "outputs"
