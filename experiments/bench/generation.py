"""Images per minute from embeddings to pixels: 16 bits, emulation, or kernels.

    python -m experiments.bench.generation tiny_pixart|tiny_sana [--ways float32 int4 …]
                                           [--compute emulate|auto|triton] [--batch 16]
                                           [--repeats 5] [--device cpu|cuda] [--output FILE.json]

The pipeline generates one batch of images of the first test captions with the model's sampler and
steps; the text is encoded before. Every way has its own pipeline; all run in one process in
alternating order. `float32` and `bf16` are the unquantised model in these types; the others are the
quantised model in the first way's type. Emulation rounds the operands and multiplies in float32, so
it cannot be faster than float32, only faster than a slow bf16.

Expected time: five minutes per model on 2 idle cores. Outcome: docs/speed.md.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from loraq import recipe, set_compute
from loraq.compose import load_rows
from loraq.data import data_prompts
from loraq.errors import LoraqError, unknown
from loraq.models import list_layers, load_pipeline
from loraq.quantization.quantizer import quantize_model
from loraq.results import record
from loraq.runner.embeddings import encode_prompts
from loraq.runner.generate import image_batch
from loraq.utils import batch_invariance
from loraq.utils.memory import reused_heap

from .forward import RECIPES
from .timing import alternate

TYPES = {"float32": "float32", "bf16": "bfloat16"}
WAYS = (*TYPES, *RECIPES)


def build_call(way: str, first: str, options: argparse.Namespace) -> functools.partial[Any]:
    """A call that generates the images of one batch."""
    dtype = TYPES.get(way, TYPES.get(first, "float32"))
    config = load_rows([f"model={options.model}", f"model.dtype={dtype}", "method=reference"])[0]
    pipe, model = load_pipeline(config.model, options.device), config.model
    pipe.set_progress_bar_config(disable=True)
    if way in RECIPES:
        layers = list_layers(pipe.transformer, model.family)
        made = quantize_model(pipe.transformer, layers, recipe(*RECIPES[way]), progress=None)
        made.apply(pipe.transformer)
        set_compute(pipe.transformer, options.compute)
    prompts = data_prompts(config.data)[: options.batch]
    embeddings = encode_prompts(pipe, model, prompts)
    return functools.partial(image_batch, pipe, model, prompts, 0, embeddings=embeddings)


def row_summary(way: str, row: dict[str, Any]) -> str:
    """One printed line per way."""
    return (
        f"{way:20} {row['images_per_minute']:7.1f} images a minute, time ratio {row['ratio']:.2f}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="an embedded model of conf/model/")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY")
    parser.add_argument("--compute", default="emulate")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for way in options.ways:
        if way not in WAYS:
            raise unknown("way", way, WAYS)
    for name in ("batch", "repeats"):
        if (value := getattr(options, name)) < 1:
            raise LoraqError(f"--{name} {value} is below the limit 1. Set 1 or more.")
    batch_invariance.configure_cpu_math()
    torch.set_num_threads(options.threads)
    calls = {way: build_call(way, options.ways[0], options) for way in options.ways}
    with reused_heap():  # as runs do
        found = alternate(calls, options.repeats, torch.device(options.device))
    for way, row in found.items():
        row["images_per_minute"] = 60 * options.batch / row["median_seconds"]
        print(row_summary(way, row), flush=True)
    if options.output is not None:
        settings = {**vars(options), "output": None, "recipes": RECIPES}
        record.save_findings({"settings": settings, "ways": found}, options.output)
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()
