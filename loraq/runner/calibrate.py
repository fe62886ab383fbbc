"""The stage that runs the 16-bit model for its activations: rows, second moments, sensitivities.

    inputs       rows of every layer's input, for methods to read or for errors to be measured on
    moments      E[xᵀx] and E[x] of every layer's input (GPTQ, weighted branches)
    sensitivity  how much each layer's error matters to the transformer's output (allocation)

All come from captions kept for this and from images that the model itself makes of them; a
data-free recipe has none of these in its plan.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.data import Prompt
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import (
    InputCapture,
    MomentCapture,
    moment_tensors,
    moments_from_tensors,
)
from loraq.quantization.grouping import make_units
from loraq.runner import generate as generation
from loraq.runner.embeddings import encode_together
from loraq.runner.product_keys import SENSITIVITY_PROMPTS, SENSITIVITY_STEPS, Row, stage_kind
from loraq.runner.session import Session
from loraq.runner.trajectories import Forward, record_forwards, sensitivity
from loraq.utils.files import reporting_full_disk, write_json

if TYPE_CHECKING:
    from torch import Tensor

SENSITIVITY = "sensitivity.json"


def calibrate(session: Session, row: Row, stage: str) -> None:
    """Make one product of activations: `inputs:calibrate`, `inputs:measure`, `moments`, …"""
    product, name = stage.split(":")[0], row.keys[stage]
    prompts = row.measuring if stage == "inputs:measure" else row.calibration
    info = {"kind": stage_kind(row, stage), "units": len(prompts)}
    with session.store.lock(product, name):
        if session.store.finished(product, name):
            return
        with session.store.write(product, name, info) as folder, reporting_full_disk(folder):
            if product == "sensitivity":
                write_json(folder / SENSITIVITY, _sensitivity(session, row))
            else:
                _capture(session, row, product, prompts, folder)


@contextlib.contextmanager
def _pipe(
    session: Session, row: Row, prompts: Sequence[Prompt], scratch: Path
) -> Iterator[tuple[Any, Callable[[int], dict[str, Tensor]]]]:
    """The pipeline without its text encoder, and the embeddings of each batch, encoded before.

    Encoder and transformer are never held together, and the embeddings lie in mapped files of
    `scratch`, a new folder that is removed by whoever gives it.
    """
    from safetensors.torch import load_file, save_file

    batches = generation.batches(prompts, row.config.generate.batch_size)
    text, files = session.text_pipe(row), []
    scratch.mkdir(parents=True)
    with session.timed("text encoder"):
        for number, batch in enumerate(session.each(batches, text="text", unit="batch")):
            files.append(scratch / f"{number:05d}.safetensors")
            save_file(encode_together(text, row.config.model, batch), files[-1])
    del text

    def embeddings(number: int) -> dict[str, Tensor]:
        return {name: x.to(row.device) for name, x in load_file(files[number]).items()}

    pipe = session.pipe(row, text=False)
    with session.timed("model forward"):
        yield pipe, embeddings


def _capture(
    session: Session, row: Row, product: str, prompts: Sequence[Prompt], folder: Path
) -> None:
    """One file an input; until then they are gathered in mapped files beside them."""
    from safetensors.torch import save_file

    model, settings = row.config.model, row.config.calibration
    batches = generation.batches(prompts, row.config.generate.batch_size)
    seed, forwards = settings.seed, len(batches) * model.steps
    scratch = folder / "scratch"
    with _pipe(session, row, prompts, scratch / "text") as (pipe, embeddings):
        layers = session.layers(row, skip=())
        capture: InputCapture | MomentCapture
        if product == "inputs":
            rows = settings.rows_per_layer
            capture = InputCapture(pipe.transformer, layers, rows, forwards, seed, scratch)
        else:
            capture = MomentCapture(pipe.transformer, layers, scratch)
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
    for number, tensors in enumerate(found):
        save_file(tensors, folder / f"{number:05d}.safetensors")
    shutil.rmtree(scratch, ignore_errors=True)


def _sensitivity(session: Session, row: Row) -> dict[str, float]:
    assert row.recipe is not None
    every = max(1, row.config.model.steps // SENSITIVITY_STEPS)
    recorded = _forwards(session, row, row.calibration[:SENSITIVITY_PROMPTS], every)
    units = make_units(session.layers(row, row.recipe.skip), row.recipe.branch.share_qkv)
    transformer, bar = session.pipe(row, text=False).transformer, session.bar("sensitivity")
    with session.timed("model forward"):
        return sensitivity(transformer, units, row.recipe, recorded, progress=bar)


def forwards(session: Session, row: Row) -> list[Forward]:
    """Every step of the 16-bit model on the first batch of captions kept for measuring."""
    return _forwards(session, row, row.measuring[: row.config.generate.batch_size])


def _forwards(
    session: Session, row: Row, prompts: Sequence[Prompt], every: int = 1
) -> list[Forward]:
    config, size = row.config, row.config.generate.batch_size
    seed = config.calibration.seed
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch,
        _pipe(session, row, prompts, Path(scratch) / "text") as (pipe, embeddings),
    ):
        return record_forwards(pipe, config.model, prompts, seed, size, every, embeddings)


def rows(session: Session, row: Row, use: str) -> dict[str, Tensor]:
    """Captured rows; made here where the plan did not foresee that they are needed."""
    return _load(_folder(session, row, f"inputs:{use}"), row.device)


def _load(folder: Path, device: str) -> dict[str, Tensor]:
    """Mapped, or on this process's own GPU: safetensors takes "cuda" for the first."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: x.to(device) for path in files for name, x in load_file(path).items()}


def activations(session: Session, row: Row) -> Activations:
    """What the row's recipe may read: nothing for a data-free one."""
    recipe = row.recipe
    assert recipe is not None
    moments = sensitivity = None
    if recipe.needs_moments:
        moments = moments_from_tensors(_load(_folder(session, row, "moments"), row.device))
    if recipe.needs_sensitivity:
        sensitivity = json.loads((_folder(session, row, "sensitivity") / SENSITIVITY).read_text())
    read = rows(session, row, "calibrate") if recipe.needs_rows else None
    return Activations(rows=read, moments=moments, sensitivity=sensitivity)


def _folder(session: Session, row: Row, stage: str) -> Path:
    product = stage.split(":")[0]
    folder = session.store.path(product, row.keys[stage])
    if not folder.is_dir():
        calibrate(session, row, stage)
    return folder
