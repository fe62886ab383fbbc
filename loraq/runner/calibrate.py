"""Calibration stages: run the 16-bit model and collect statistics of its activations.

    inputs       rows of every layer's input, for calibrated methods and for output errors
    moments      E[xᵀx] and E[x] of every layer's input (GPTQ, weighted branches)
    sensitivity  effect of each layer's error on the transformer's output (allocation)

The model generates from captions reserved for this. The plan of a data-free recipe contains only
the inputs on which output errors are measured.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraq.data import Prompt
from loraq.models.denoisers import denoiser_of
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import (
    InputCapture,
    MomentCapture,
    moment_tensors,
    moments_from_tensors,
)
from loraq.quantization.grouping import make_units
from loraq.runner import generate as generation
from loraq.runner.embeddings import encode_batch, read_text, to_bytes
from loraq.runner.product_keys import SENSITIVITY_PROMPTS, SENSITIVITY_STEPS
from loraq.runner.rows import Row, Stage
from loraq.runner.sensitivity import measure_sensitivity
from loraq.runner.session import Session
from loraq.runner.text import Text
from loraq.runner.trajectories import Forward, record_forwards
from loraq.utils.disk_errors import reporting_disk_errors
from loraq.utils.files import replacing, write_bytes, write_json

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import Tensor

SENSITIVITY = "sensitivity.json"


def calibrate_row(session: Session, row: Row, stage: Stage) -> None:
    """Write the product of one stage in `ACTIVATIONS`, unless it is already finished."""
    product, name = row.product(stage)
    prompts = row.measuring if stage is Stage.MEASURING_INPUTS else row.calibration
    info = {"kind": row.kind(stage), "units": len(prompts)}
    with session.store.lock(product, name):
        if session.store.finished(product, name):
            return
        pieces: list[str] = []
        with (
            session.store.write(product, name, info, pieces) as folder,
            reporting_disk_errors(folder),
        ):
            if stage is Stage.SENSITIVITY:
                pieces += [SENSITIVITY]
                write_json(folder / SENSITIVITY, _sensitivity(session, row))
            else:
                pieces += _capture(session, row, product, prompts, folder)


@contextlib.contextmanager
def _pipe_and_embeddings(
    session: Session, row: Row, prompts: Sequence[Prompt], scratch: Path
) -> Iterator[tuple[DiffusionPipeline, Callable[[int], Text]]]:
    """The pipeline without its text encoder, and a function: batch number → its embeddings.

    All prompts are encoded first, so that text encoder and transformer are never in memory
    together. The embeddings are memory-mapped files in `scratch`, a new folder; the caller
    removes it.
    """
    batches = generation.batches(prompts, row.config.generate.batch_size)
    text, files = session.text_pipe(row), []
    scratch.mkdir(parents=True)
    with session.timed("text encoder"):
        for number, batch in enumerate(session.each(batches, text="text", unit="batch")):
            files.append(scratch / f"{number:05d}.safetensors")
            found = encode_batch(text, row.config.model, batch)
            write_bytes(files[-1], to_bytes(found, whole=True))
    del text

    def embeddings(number: int) -> Text:
        return read_text(files[number], row.device)

    pipe = session.pipe(row, text=False)
    with session.timed("model forward"):
        yield pipe, embeddings


def _capture(
    session: Session, row: Row, product: str, prompts: Sequence[Prompt], folder: Path
) -> list[str]:
    """Write one file per input and return their names.

    The data is collected in memory-mapped files in `scratch` first.
    """
    from safetensors.torch import save_file

    model, settings = row.config.model, row.config.calibration
    batches = generation.batches(prompts, row.config.generate.batch_size)
    seed, forwards = settings.seed, len(batches) * model.step_count
    scratch = folder / "scratch"
    with _pipe_and_embeddings(session, row, prompts, scratch / "text") as (pipe, embeddings):
        layers = session.layers(row, skip=())
        capture: InputCapture | MomentCapture
        if product == "inputs":
            rows = settings.rows_per_layer
            capture = InputCapture(denoiser_of(pipe), layers, rows, forwards, seed, scratch)
        else:
            capture = MomentCapture(denoiser_of(pipe), layers, scratch)
        bar = session.each(batches, f"{product} of the 16-bit model", "batch")
        with capture:
            for number, batch in enumerate(bar):
                text = embeddings(number)
                generation.image_batch(
                    pipe, model, batch, seed, output_type="latent", embeddings=text
                )
    found: Iterable[dict[str, Tensor]]
    if isinstance(capture, InputCapture):
        found = ({name: rows} for name, rows in capture.inputs().items())
    else:
        found = moment_tensors(capture.moments())
    names = []
    for number, tensors in enumerate(found):
        names.append(f"{number:05d}.safetensors")
        with replacing(folder / names[-1]) as temporary:
            save_file(tensors, temporary)
    shutil.rmtree(scratch, ignore_errors=True)
    return names


def _sensitivity(session: Session, row: Row) -> dict[str, float]:
    assert row.recipe is not None
    every = max(1, row.config.model.step_count // SENSITIVITY_STEPS)
    recorded = _record_forwards(session, row, row.calibration[:SENSITIVITY_PROMPTS], every)
    units = make_units(session.layers(row, row.recipe.skip), row.recipe.branch.share_qkv)
    denoiser, bar = denoiser_of(session.pipe(row, text=False)), session.bar("sensitivity")
    with session.timed("model forward"):
        return measure_sensitivity(denoiser, units, row.recipe, recorded, progress=bar)


def measuring_forwards(session: Session, row: Row) -> list[Forward]:
    """All steps of the 16-bit model on the first batch of the measuring captions."""
    return _record_forwards(session, row, row.measuring[: row.config.generate.batch_size])


def _record_forwards(
    session: Session, row: Row, prompts: Sequence[Prompt], every: int = 1
) -> list[Forward]:
    config, size = row.config, row.config.generate.batch_size
    seed = config.calibration.seed
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        _pipe_and_embeddings(session, row, prompts, Path(scratch) / "text") as (pipe, embeddings),
    ):
        return record_forwards(pipe, config.model, prompts, seed, size, every, embeddings)


def load_inputs(session: Session, row: Row, stage: Stage) -> dict[str, Tensor]:
    """Rows of the layers' inputs by input name, in the dtype in which they were captured.

    They are memory-mapped: what reads them moves one group's to a GPU. Captured first if the
    product is missing.
    """
    return _load_tensors(_product_folder(session, row, stage))


def _load_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a product, memory-mapped."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: x for path in files for name, x in load_file(path).items()}


def load_activations(session: Session, row: Row) -> Activations:
    """The calibration statistics that the row's recipe reads; all None for a data-free recipe."""
    recipe = row.recipe
    assert recipe is not None
    moments = sensitivity = None
    if recipe.needs_moments:
        folder = _product_folder(session, row, Stage.MOMENTS)
        moments = moments_from_tensors(_load_tensors(folder))
    if recipe.needs_sensitivity:
        sensitivity = json.loads(
            (_product_folder(session, row, Stage.SENSITIVITY) / SENSITIVITY).read_text()
        )
    inputs = load_inputs(session, row, Stage.CALIBRATION_INPUTS) if recipe.needs_rows else None
    return Activations(rows=inputs, moments=moments, sensitivity=sensitivity)


def _product_folder(session: Session, row: Row, stage: Stage) -> Path:
    folder = session.store.path(*row.product(stage))
    if not folder.is_dir():
        calibrate_row(session, row, stage)
    return folder
