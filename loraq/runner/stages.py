"""The stages after calibration: quantise, encode the prompts, generate. `experiment.py` runs them.

Every stage locks its product, checks again whether it is finished, and writes it to a temporary
folder that is renamed at the end.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loraq.config import Recipe
from loraq.layers.backends import ComputeMode
from loraq.models.layers import Layer
from loraq.quantization.group_file import group_files, load_group
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_model
from loraq.runner import embeddings
from loraq.runner import generate as generation
from loraq.runner.calibrate import load_activations
from loraq.runner.rows import Row, Stage
from loraq.runner.session import Session


def quantize_row(session: Session, row: Row) -> QuantizedModel:
    """The row's packed layers: read if they are finished, otherwise made group by group.

    Layers that were read stay in the session until those of another row are read.
    """
    assert row.recipe is not None
    name, recipe = row.keys[Stage.QUANTIZED], row.recipe
    if session.packed is not None and session.packed[0] == name:
        return session.packed[1]
    layers = session.layers(row, row.recipe.skip)
    with session.store.lock(Stage.QUANTIZED, name):
        if session.store.finished(Stage.QUANTIZED, name):
            with session.timed("read packed layers"):
                packed = read_packed(
                    session.store.path(Stage.QUANTIZED, name), layers, recipe, row.device
                )
            if packed is not None:
                session.packed = name, packed
                return packed
            session.store.set_aside(Stage.QUANTIZED, name, "groups of layers are missing")
        statistics = load_activations(session, row)
        info: dict[str, Any] = {"kind": row.kind(Stage.QUANTIZED), "units": 1}
        pieces: list[str] = []
        with (
            session.timed("quantise"),
            session.store.write(Stage.QUANTIZED, name, info, pieces, resume=True) as folder,
        ):
            bar, family = session.bar("quantise"), row.config.model.family
            transformer = session.transformer(row)
            release = session.release(row)
            model = quantize_model(
                transformer, layers, recipe, statistics, folder, bar, family, release
            )
            info["seconds"] = sum(group.get("seconds", 0.0) for group in model.info.values())
            pieces += group_files(model.info)
            return model


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
    """The folder with the embeddings of the row's prompts; they are made if missing."""
    name = row.keys[Stage.EMBEDDINGS]
    info: dict[str, Any] = {"kind": row.kind(Stage.EMBEDDINGS), "units": len(row.prompts)}
    pieces = row.pieces(Stage.EMBEDDINGS)
    with session.store.lock(Stage.EMBEDDINGS, name):
        if not session.store.finished(Stage.EMBEDDINGS, name, pieces):
            pipe, bar = (
                session.text_pipe(row),
                functools.partial(session.each, text="text", unit="batch"),
            )
            with (
                session.timed("text encoder"),
                session.store.write(Stage.EMBEDDINGS, name, info, pieces, resume=True) as folder,
            ):
                size = row.config.generate.batch_size
                embeddings.write_embeddings(pipe, row.config.model, row.prompts, size, folder, bar)
    return session.store.path(Stage.EMBEDDINGS, name)


def generate_row(session: Session, row: Row) -> None:
    """Make the row's images; processes that need the same images share the batches."""
    name, text = row.keys[Stage.IMAGES], embed_row(session, row)
    info: dict[str, Any] = {"kind": row.kind(Stage.IMAGES), "units": len(row.prompts)}
    model = None if row.recipe is None else quantize_row(session, row)
    pipe = session.pipe(row, text=False)
    with session.store.share(Stage.IMAGES, name, info, row.pieces(Stage.IMAGES)) as folder:
        if folder is None:
            return
        with session.timed("model forward"), applied(model, pipe.transformer, row.config.compute):
            claim = functools.partial(session.store.locks.part, Stage.IMAGES, name)
            generation.generate_images(
                pipe,
                row.config.model,
                row.prompts,
                row.config.generate,
                folder,
                session.bar("images"),
                claim,
                lambda number: embeddings.read_embeddings(text, number, row.device),
            )
        with contextlib.suppress(FileNotFoundError):  # another process has finished the product
            info["seconds"] = generation.generation_seconds(folder)


@contextlib.contextmanager
def applied(model: QuantizedModel | None, transformer: Any, compute: ComputeMode) -> Iterator[None]:
    """Context in which the packed layers replace the transformer's; no-op without a model.

    Raises LoraqError if the transformer does not compute with all of them.
    """
    if model is None:
        yield
        return
    with model.applied(transformer, compute):
        model.check_called(transformer)
        yield
