"""One row of an experiment: its configuration, its prompts, and the keys of its products."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from loraq.config import Config, Recipe
from loraq.data import Prompt
from loraq.models.outputs import output_kind
from loraq.runner import embeddings
from loraq.runner import generate as generation


class Stage(StrEnum):
    """The stages of a row in order; each makes one product in the store."""

    CALIBRATION_INPUTS = "inputs:calibrate"
    """Rows of every layer's input, for calibrated methods."""
    MOMENTS = "moments"
    """Second moments of every layer's input, for calibrated methods."""
    SENSITIVITY = "sensitivity"
    """How much each layer's error changes the transformer's output, for allocation."""
    MEASURING_INPUTS = "inputs:measure"
    """Rows of every layer's input on other captions, for measuring output errors."""
    QUANTIZED = "quantised"
    """The packed layers."""
    EMBEDDINGS = "embeddings"
    """Text embeddings of the prompts."""
    IMAGES = "images"
    """PNG files. The 16-bit row's are the reference of all rows with the same prompts."""
    MEASURED = "measured"
    """Errors and metrics, without the row's names."""
    RECORD = "record"
    """The measured values with names, settings, timings and origin."""

    @property
    def folder(self) -> str:
        """The product's folder in the store; both kinds of inputs share one."""
        return "inputs" if self.value.startswith("inputs") else self.value


ACTIVATIONS = (
    Stage.CALIBRATION_INPUTS,
    Stage.MOMENTS,
    Stage.SENSITIVITY,
    Stage.MEASURING_INPUTS,
)
"""Stages that run the 16-bit model for its activations, in order."""
REFERENCE = "reference"
"""Name in `Row.keys` of the key of the 16-bit images that the row is compared with."""


@dataclass(frozen=True)
class Row:
    """One row with its prompts and the keys of its products.

    keys: stage → key of its product, and `REFERENCE`. todo: the stages still to be made; elsewhere:
    those of them that another GPU has made (which, in words). arithmetic: what decides the values
    of this GPU (`gpu_arithmetic`); None on a CPU.
    """

    config: Config
    model_hash: str
    device: str
    threads: int
    prompts: Sequence[Prompt]
    calibration: Sequence[Prompt]
    measuring: Sequence[Prompt]
    keys: dict[str, str] = field(default_factory=dict)
    todo: frozenset[Stage] = frozenset()
    elsewhere: Mapping[Stage, str] = field(default_factory=dict)
    arithmetic: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """The row's name; for a run without experiment, the method."""
        return self.config.row or self.config.method

    @property
    def label(self) -> str:
        """The row's name in tables."""
        return self.config.label or self.name

    @property
    def recipe(self) -> Recipe | None:
        """The quantisation recipe; None for the 16-bit row."""
        return self.config.quant

    @property
    def stages(self) -> list[Stage]:
        """The row's stages in order."""
        return [stage for stage in Stage if stage in self.keys]

    def product(self, stage: Stage) -> tuple[str, str]:
        """(folder, key) of a stage's product in the store."""
        return stage.folder, self.keys[stage]

    def pieces(self, stage: Stage) -> list[str]:
        """The files of a stage's product, as far as the plan knows them."""
        size = self.config.generate.batch_size
        if stage is Stage.IMAGES:
            return generation.image_files(self.prompts, size, output_kind(self.config.model))
        if stage is Stage.EMBEDDINGS:
            return embeddings.embedding_files(self.prompts, size)
        return []

    def kind(self, stage: Stage) -> str:
        """Label of the manifest's timings; products of one kind take about the same time."""
        emulated = "16-bit" if self.recipe is None else "emulated"
        model = self.config.model
        processor = self.device if self.arithmetic is None else self.arithmetic["name"]
        words = [stage.folder, model.name, processor]
        if stage is Stage.IMAGES:
            words += [emulated, f"{model.height}x{model.width}"]
        elif stage is Stage.QUANTIZED:
            words += [self.config.method]
        elif stage in (Stage.MEASURED, Stage.RECORD):
            words += [emulated, str(len(self.prompts))]
        return " ".join(words)

    def __repr__(self) -> str:
        return f"Row({self.name!r}, todo=[{', '.join(s for s in Stage if s in self.todo)}])"
