"""Seconds to quantise the embedded model, compared with the reference implementation's algorithms.

    python -m experiments.bench.quantise [--repeats 5] [--threads 2] [--methods rtn lqer …]
                                         [--block pixart_sigma|sana_1_6b] [--rounds N]
                                         [--output FILE.json]

With `--block`, one block with a full-size model's shapes and synthetic weights (`make_fullsize`)
instead. Each round of the reference takes minutes there; `--rounds` limits them for both.

Runs every data-free method in two ways: as the library does (equal layers in one batch, leading
eigenvectors of a float64 Gram matrix), and as the reference does (one layer at a time, full float64
SVDs with `torch.linalg.svd`), with everything else equal. Both alternate in one process in changing
order, so that other load affects both; times are medians of the repeats, the ratio is the median of
the ratios within a repeat. Exits with an error if the mean weight errors differ by more than 1 %.

Expected time: one to three minutes per repeat on 2 cores, one for the block of PixArt-Σ. Outcome:
results/bench/quantise.json, docs/speed.md. At equal errors, LoftQ, whose subspace is tracked
between rounds, is over twenty times as fast, the other branches about twice; RTN has no SVD.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from loraq import recipe
from loraq.branches.linear_algebra import tracked_svd, truncated_svd
from loraq.compose import load_rows
from loraq.config import Recipe
from loraq.config.recipe_parts import ANY_BRANCH
from loraq.errors import LoraqError, unknown
from loraq.models import Layer, list_layers, load_pipeline, weights_hash
from loraq.models.pointwise import weight_matrix
from loraq.quantization.model import QuantizedModel
from loraq.quantization.quantizer import quantize_model
from loraq.results import record
from loraq.utils import batch_invariance

from . import make_fullsize

METHODS = {
    "rtn": ("rtn",),
    "lqer": ("lqer",),
    "loftq": ("loftq",),
    "loraq_o1": ("loraq_o1",),
    "loraq_o2": ("loraq_o2",),
    "loraq_o2_w4a8": ("loraq_o2", "format@quant.branch_weight=int4"),
}
"""Row → preset and overrides."""

SAME_ERROR = 0.01
HEADER = ("method", "library, s", "full SVDs one by one, s", "ratio", "weight error", "theirs")


def full_svd(w_BOI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Replacement of `truncated_svd` as in the reference: a full float64 SVD per unit."""
    lefts, rights = [], []
    for w_OI in w_BOI.double():
        u, s, vh = torch.linalg.svd(w_OI, full_matrices=False)
        root = s[:rank].sqrt()
        lefts.append(u[:, :rank] * root)
        rights.append(root[:, None] * vh[:rank])
    return torch.stack(lefts).to(w_BOI.dtype), torch.stack(rights).to(w_BOI.dtype)


def untracked_full_svd(w_BOI: Tensor, rank: int, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replacement of `tracked_svd` without tracking: `full_svd`."""
    return *full_svd(w_BOI, rank), image


REPLACEMENTS = {truncated_svd: full_svd, tracked_svd: untracked_full_svd}


@contextlib.contextmanager
def reference_way() -> Iterator[None]:
    """Context manager: every group has one unit, and branch finders use full SVDs."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch("loraq.quantization.grouping.MAX_GROUP_ELEMENTS", 1))
        for kind in ANY_BRANCH:
            module = importlib.import_module(f"loraq.branches.{kind}")
            for svd, full in REPLACEMENTS.items():
                if getattr(module, svd.__name__, None) is svd:
                    stack.enter_context(mock.patch.object(module, svd.__name__, full))
        yield


WAYS = {"library": contextlib.nullcontext, "reference": reference_way}


def weight_error(made: QuantizedModel, transformer: nn.Module) -> float:
    """Mean over layers of ‖W − Ŵ‖_F / ‖W‖_F."""
    errors = []
    for name, tensors in made.layers.items():
        w_OI = weight_matrix(transformer.get_submodule(name)).float()
        errors.append(((tensors.effective_weight() - w_OI).norm() / w_OI.norm()).item())
    return sum(errors) / len(errors)


def measure_method(
    transformer: nn.Module, layers: Sequence[Layer], chosen: Recipe, repeats: int
) -> dict[str, Any]:
    """Seconds of every repeat, weight error of both ways, rank and bits per weight."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    errors: dict[str, float] = {}
    for repeat in range(repeats):
        for way in sorted(WAYS, reverse=bool(repeat % 2)):
            with WAYS[way]():
                begin = time.perf_counter()
                made = quantize_model(transformer, layers, chosen, progress=None)
                seconds[way].append(time.perf_counter() - begin)
            errors[way] = weight_error(made, transformer)
    pairs = zip(seconds["reference"], seconds["library"], strict=True)
    return {
        "seconds": seconds,
        "median_seconds": {way: median(times) for way, times in seconds.items()},
        "ratio": median(theirs / ours for theirs, ours in pairs),
        "weight_error": errors,
        "rank": made.rank,
        "bits_per_weight": made.bits_per_weight,
    }


def markdown_table(found: dict[str, dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = ["| " + " | ".join(HEADER) + " |", "|---" + "|---:" * (len(HEADER) - 1) + "|"]
    for name, row in found.items():
        times, errors = row["median_seconds"], row["weight_error"]
        cells = (
            name,
            f"{times['library']:.2f}",
            f"{times['reference']:.2f}",
            f"{row['ratio']:.2f}",
            f"{errors['library']:.5f}",
            f"{errors['reference']:.5f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--block", choices=make_fullsize.CONFIGS)
    parser.add_argument("--rounds", type=int, help="quant.branch.steps of methods that iterate")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for name in options.methods:
        if name not in METHODS:
            raise unknown("data-free method", name, METHODS)
    if options.repeats < 1:
        raise LoraqError(f"--repeats {options.repeats} is below the limit 1. Set 1 or more.")
    batch_invariance.configure_cpu_math()
    torch.set_num_threads(options.threads)
    rounds = [] if options.rounds is None else [f"quant.branch.steps={options.rounds}"]
    recipes = {
        name: recipe(*METHODS[name], *(rounds if name not in ("rtn", "lqer") else []))
        for name in options.methods
    }
    model = load_rows(["method=rtn", f"model={options.block or 'tiny_pixart'}"])[-1].model
    if options.block:
        transformer, model_hash = make_fullsize.synthetic_model(options.block, 1), "synthetic"
    else:
        transformer, model_hash = load_pipeline(model, "cpu").transformer, weights_hash(model)
    layers = list_layers(transformer, model.family)
    weights = sum(out * width for out, width in (layer.shape for layer in layers))
    print(f"{len(layers)} layers, {weights} weights, {options.threads} threads")
    found = {}
    quantize_model(transformer, layers, recipe("rtn"), progress=None)  # warm-up: lazy imports
    for name, chosen in recipes.items():
        found[name] = measure_method(transformer, layers, chosen, options.repeats)
    print(markdown_table(found))
    if options.output is not None:
        settings = {n: getattr(options, n) for n in ("repeats", "threads", "block", "rounds")}
        model_of = {"name": model.name, "hash": model_hash, "weights": weights}
        result = {"settings": settings, "model": model_of, "methods": found}
        record.save_findings(result, options.output)
    for name, row in found.items():
        ours, theirs = row["weight_error"]["library"], row["weight_error"]["reference"]
        if abs(ours - theirs) > SAME_ERROR * theirs:
            raise SystemExit(f"{name}: the weight errors differ, {ours:.5f} and {theirs:.5f}")


if __name__ == "__main__":
    main()
