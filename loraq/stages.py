"""The stages after the activations: quantise, generate, measure. `run.py` orders them.

Every stage takes its product's lock, looks
again whether it is there, and writes it aside before it counts as finished.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq import generate as generation
from loraq.activations import activations
from loraq.estimate import stage_kind
from loraq.keys import Row
from loraq.models.layers import Layer
from loraq.workshop import Workshop

if TYPE_CHECKING:
    from loraq.quantization.model import QuantizedModel


def quantise(work: Workshop, row: Row) -> QuantizedModel:
    """The row's packed layers: made group by group, or read where they are finished."""
    from loraq.quantization.quantizer import quantize_model

    assert row.recipe is not None
    name, recipe = row.keys["quantised"], row.recipe
    layers = work.layers(row, row.recipe.skip)
    with work.store.lock("quantised", name):
        if work.store.finished("quantised", name):
            with work.timed("read packed layers"):
                return read_packed(work.store.path("quantised", name), layers)
        read = activations(work, row)
        info: dict[str, Any] = {"kind": stage_kind(row, "quantised"), "units": 1}
        with (
            work.timed("quantise"),
            work.store.write("quantised", name, info, resume=True) as folder,
        ):
            bar, family = work.bar("quantise"), row.config.model.family
            transformer = work.transformer(row)
            release = work.release(row)
            model = quantize_model(transformer, layers, recipe, read, folder, bar, family, release)
            info["seconds"] = sum(group.get("seconds", 0.0) for group in model.info.values())
            return model


def read_packed(folder: Path, layers: Sequence[Layer]) -> QuantizedModel:
    """A finished product's packed layers; its files were checked against their checksums."""
    from loraq.quantization.group_file import load_group
    from loraq.quantization.model import QuantizedModel

    found, info = {}, {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, info[path.stem] = load_group(path)
        found.update(tensors)
    return QuantizedModel({layer.name: found[layer.name] for layer in layers}, info)


def embed(work: Workshop, row: Row) -> Path:
    """The folder with the embeddings of the row's prompts, made where they are missing."""
    from loraq import embeddings

    name = row.keys["embeddings"]
    info: dict[str, Any] = {"kind": stage_kind(row, "embeddings"), "units": len(row.prompts)}
    with work.store.lock("embeddings", name):
        if not work.store.finished("embeddings", name):
            pipe, bar = work.text_pipe(row), functools.partial(work.each, text="text", unit="batch")
            with (
                work.timed("text encoder"),
                work.store.write("embeddings", name, info, resume=True) as folder,
            ):
                size = row.config.generate.batch_size
                embeddings.write(pipe, row.config.model, row.prompts, size, folder, bar)
    return work.store.path("embeddings", name)


def generate(work: Workshop, row: Row) -> None:
    """The row's images, batch by batch; processes that want the same ones share the batches."""
    from loraq import embeddings

    name, text = row.keys["images"], embed(work, row)
    info: dict[str, Any] = {"kind": stage_kind(row, "images"), "units": len(row.prompts)}
    model = None if row.recipe is None else quantise(work, row)
    pipe = work.pipe(row, text=False)
    with work.store.share("images", name, info) as folder:
        if folder is None:
            return
        with work.timed("model forward"), applied(model, pipe.transformer, row.config.compute):
            claim = functools.partial(work.store.claim, "images", name)
            generation.generate(
                *(pipe, row.config.model, row.prompts, row.config.generate),
                *(folder, work.bar("images"), claim),
                lambda number: embeddings.read(text, number, row.device),
            )
        if folder.is_dir():
            info["seconds"] = generation.generation_seconds(folder)


@contextlib.contextmanager
def applied(
    model: QuantizedModel | None, transformer: Any, compute: str = "emulate"
) -> Iterator[None]:
    """The transformer with the packed layers in place of its own while the block runs."""
    if model is None:
        yield
        return
    from loraq.layers.linear import set_compute

    model.apply(transformer)
    try:
        set_compute(transformer, compute)
        yield
    finally:
        model.revert(transformer)
