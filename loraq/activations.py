"""The stage that runs the 16-bit model for its activations: rows, second moments, sensitivities.

    inputs       rows of every layer's input, for methods to read or for errors to be measured on
    moments      E[xᵀx] and E[x] of every layer's input (GPTQ, weighted branches)
    sensitivity  how much each layer's error matters to the transformer's output (allocation)

All come from captions kept for this and from images that the model itself makes of them; a
data-free recipe has none of these in its plan.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from loraq import generate as generation
from loraq.data import Prompt
from loraq.estimate import stage_kind
from loraq.keys import SENSITIVITY_PROMPTS, SENSITIVITY_STEPS, Row
from loraq.store import write_json
from loraq.workshop import Workshop, full_disk_is_ours

if TYPE_CHECKING:
    from torch import Tensor

    from loraq.capture import Activations
    from loraq.replay import Forward

SENSITIVITY = "sensitivity.json"


def calibrate(work: Workshop, row: Row, stage: str) -> None:
    """Make one product of activations: `inputs:calibrate`, `inputs:measure`, `moments`, …"""
    product, name = stage.split(":")[0], row.keys[stage]
    prompts = row.measuring if stage == "inputs:measure" else row.calibration
    info = {"kind": stage_kind(row, stage), "units": len(prompts)}
    with work.store.lock(product, name):
        if work.store.finished(product, name):
            return
        work.pipe(row)
        with (
            work.store.write(product, name, info) as folder,
            work.timed("model forward"),
            full_disk_is_ours(folder),
        ):
            if product == "sensitivity":
                write_json(folder / SENSITIVITY, _sensitivity(work, row))
            else:
                _capture(work, row, product, prompts, folder)


def _capture(
    work: Workshop, row: Row, product: str, prompts: Sequence[Prompt], folder: Path
) -> None:
    """One file an input; until then they are gathered in mapped files beside them."""
    from safetensors.torch import save_file

    from loraq.capture import InputCapture, MomentCapture, moment_tensors

    pipe, model, settings = work.pipe(row), row.config.model, row.config.calibration
    layers = work.layers(row, skip=())
    batches = generation.batches(prompts, row.config.generate.batch_size)
    seed, forwards = settings.seed, len(batches) * model.steps
    scratch, transformer = folder / "scratch", pipe.transformer
    capture: InputCapture | MomentCapture
    if product == "inputs":
        rows = settings.rows_per_layer
        capture = InputCapture(transformer, layers, rows, forwards, seed, scratch)
    else:
        capture = MomentCapture(transformer, layers, scratch)
    with capture:
        for batch in work.each(batches, f"{product} of the 16-bit model", "batch"):
            generation.image_batch(pipe, model, batch, seed, output_type="latent")
    found: Iterable[dict[str, Tensor]]
    if isinstance(capture, InputCapture):
        found = ({name: rows} for name, rows in capture.inputs().items())
    else:
        found = moment_tensors(capture.moments())
    for number, tensors in enumerate(found):
        save_file(tensors, folder / f"{number:05d}.safetensors")
    shutil.rmtree(scratch, ignore_errors=True)


def _sensitivity(work: Workshop, row: Row) -> dict[str, float]:
    from loraq.replay import record_forwards, sensitivity
    from loraq.units import make_units

    assert row.recipe is not None
    pipe, config = work.pipe(row), row.config
    size, every = config.generate.batch_size, max(1, config.model.steps // SENSITIVITY_STEPS)
    prompts = row.calibration[:SENSITIVITY_PROMPTS]
    recorded = record_forwards(pipe, config.model, prompts, config.calibration.seed, size, every)
    units = make_units(work.layers(row, row.recipe.skip), row.recipe.branch.share_qkv)
    bar = work.bar("sensitivity")
    return sensitivity(pipe.transformer, units, row.recipe, recorded, progress=bar)


def forwards(work: Workshop, row: Row) -> list[Forward]:
    """Every step of the 16-bit model on the first batch of captions kept for measuring."""
    from loraq.replay import record_forwards

    config, size = row.config, row.config.generate.batch_size
    seed = config.calibration.seed
    return record_forwards(work.pipe(row), config.model, row.measuring[:size], seed, size)


def rows(work: Workshop, row: Row, use: str) -> dict[str, Tensor]:
    """Captured rows; made here where the plan did not foresee that they are needed."""
    return _load(_folder(work, row, f"inputs:{use}"), row.device)


def _load(folder: Path, device: str) -> dict[str, Tensor]:
    """Mapped, or on this process's own GPU: safetensors takes "cuda" for the first."""
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    return {name: x.to(device) for path in files for name, x in load_file(path).items()}


def activations(work: Workshop, row: Row) -> Activations:
    """What the row's recipe may read: nothing for a data-free one."""
    from loraq.capture import Activations, moments_from

    recipe = row.recipe
    assert recipe is not None
    moments = sensitivity = None
    if recipe.needs_moments:
        moments = moments_from(_load(_folder(work, row, "moments"), row.device))
    if recipe.needs_sensitivity:
        sensitivity = json.loads((_folder(work, row, "sensitivity") / SENSITIVITY).read_text())
    read = rows(work, row, "calibrate") if recipe.needs_rows else None
    return Activations(rows=read, moments=moments, sensitivity=sensitivity)


def _folder(work: Workshop, row: Row, stage: str) -> Path:
    product = stage.split(":")[0]
    folder = work.store.path(product, row.keys[stage])
    if not folder.is_dir():
        calibrate(work, row, stage)
    return folder
