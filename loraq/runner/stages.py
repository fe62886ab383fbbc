"""The stages after calibration: quantise, encode the prompts, generate. `experiment.py` runs them.

Processes that need the same product share its parts: groups of layers, batches of prompts, batches
of images. The first process that finds all parts finished, by any, renames the folder.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from loraq.config import Recipe
from loraq.data import Prompt
from loraq.layers.backends import ComputeMode
from loraq.models.denoisers import denoiser_of
from loraq.models.layers import Layer
from loraq.quantization.group_file import group_files, load_group, seconds_of_groups
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_groups
from loraq.runner import embeddings
from loraq.runner import generate as generation
from loraq.runner.calibrate import load_activations
from loraq.runner.rows import Row, Stage
from loraq.runner.session import Session
from loraq.runner.text import Text
from loraq.utils.parts import Claim


def quantize_row(session: Session, row: Row) -> QuantizedModel:
    """The row's packed layers: read if they are finished, otherwise made group by group.

    They stay in the session until those of another row are read.
    """
    name = row.keys[Stage.QUANTIZED]
    if session.packed is not None and session.packed[0] == name:
        return session.packed[1]
    while (packed := _read_row(session, row)) is None:
        _quantize_groups(session, row)
    session.packed = name, packed
    return packed


def _read_row(session: Session, row: Row) -> QuantizedModel | None:
    """The row's packed layers, None if the product is missing or damaged."""
    assert row.recipe is not None
    product = Stage.QUANTIZED, row.keys[Stage.QUANTIZED]
    layers = session.layers(row, row.recipe.skip)
    with session.store.lock(*product):
        if not session.store.finished(*product):
            return None
        with session.timed("read packed layers"):
            folder = session.store.path(*product)
            packed = read_packed(folder, layers, row.recipe, row.device)
        if packed is None:
            session.store.set_aside(*product, "groups of layers are missing")
    return packed


def _quantize_groups(session: Session, row: Row) -> None:
    """Make the row's packed layers; processes that need the same layers share the groups."""
    assert row.recipe is not None
    product = Stage.QUANTIZED, row.keys[Stage.QUANTIZED]
    layers, statistics = session.layers(row, row.recipe.skip), load_activations(session, row)
    info: dict[str, Any] = {"kind": row.kind(Stage.QUANTIZED), "units": 1}
    pieces: list[str] = []
    with session.timed("quantise"), session.store.share(*product, info, pieces) as folder:
        if folder is None:
            return
        names = quantize_groups(
            session.denoiser(row),
            layers,
            row.recipe,
            folder,
            statistics,
            session.bar("quantise"),
            row.config.model.family,
            session.release(row),
            _claim(session, *product),
        )
        pieces += group_files(names)
        with contextlib.suppress(FileNotFoundError):  # another process has finished the product
            info["seconds"] = seconds_of_groups(folder, names)


def _claim(session: Session, stage: str, name: str) -> Claim:
    return functools.partial(session.store.locks.part, stage, name)


def read_packed(
    folder: Path,
    layers: Sequence[Layer],
    recipe: Recipe | None = None,
    device: str = "cpu",
) -> QuantizedModel | None:
    """The packed layers of a finished product, whose checksums were verified before, on `device`.

    None if one of `layers` is missing.
    """
    found, info = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, info[path.stem] = load_group(path, device)
        found.update(tensors)
    if any(layer.name not in found for layer in layers):
        return None
    ordered = {layer.name: found[layer.name] for layer in layers}
    return QuantizedModel(ordered, info, recipe, {layer.name: layer.role for layer in layers})


def embed_row(session: Session, row: Row) -> Path:
    """The folder with the embeddings of the row's prompts; they are made if missing.

    Processes that need the same embeddings share the batches; one that makes none does not load the
    text encoder.
    """
    product = Stage.EMBEDDINGS, row.keys[Stage.EMBEDDINGS]
    info: dict[str, Any] = {"kind": row.kind(Stage.EMBEDDINGS), "units": len(row.prompts)}
    text_pipe = functools.cache(functools.partial(session.text_pipe, row))
    rates = []  # seconds per prompt, of the batches that this process makes

    def encode(batch: Sequence[Prompt]) -> Text:
        pipe, started = text_pipe(), time.perf_counter()
        with session.timed("text encoder"):
            found = embeddings.encode_prompts(pipe, row.config.model, batch)
        rates.append((time.perf_counter() - started) / len(batch))
        return found

    with session.store.share(*product, info, row.pieces(Stage.EMBEDDINGS)) as folder:
        if folder is not None:
            size, bar = row.config.generate.batch_size, session.bar("text")
            claim = _claim(session, *product)
            embeddings.write_embeddings(encode, row.prompts, size, folder, bar, claim)
            if rates:
                info["seconds"] = fmean(rates) * len(row.prompts)
    return session.store.path(*product)


def generate_row(session: Session, row: Row) -> None:
    """Make the row's images; processes that need the same images share the batches."""
    name, text = row.keys[Stage.IMAGES], embed_row(session, row)
    info: dict[str, Any] = {"kind": row.kind(Stage.IMAGES), "units": len(row.prompts)}
    model = None if row.recipe is None else quantize_row(session, row)
    pipe = session.pipe(row, text=False)
    with session.store.share(Stage.IMAGES, name, info, row.pieces(Stage.IMAGES)) as folder:
        if folder is None:
            return
        denoiser, compute = denoiser_of(pipe), row.config.compute
        with session.timed("model forward"), applied(model, denoiser, compute):
            generation.generate_images(
                pipe,
                row.config.model,
                row.prompts,
                row.config.generate,
                folder,
                session.bar("images"),
                _claim(session, Stage.IMAGES, name),
                lambda number: embeddings.read_embeddings(text, number, row.device),
            )
        with contextlib.suppress(FileNotFoundError):  # another process has finished the product
            info["seconds"] = generation.generation_seconds(folder)


@contextlib.contextmanager
def applied(model: QuantizedModel | None, denoiser: Any, compute: ComputeMode) -> Iterator[None]:
    """Context in which the packed layers replace the denoiser's; no-op without a model.

    Raises LoraqError if the denoiser does not compute with all of them.
    """
    if model is None:
        yield
        return
    with model.applied(denoiser, compute):
        model.check_called(denoiser)
        yield
