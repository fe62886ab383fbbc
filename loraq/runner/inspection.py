"""`loraq inspect`: the layers of a model and what a method would make of them, without weights.

Reads configurations alone. Products of a forward are those of one image, video or clip at the
model's size, from forwards without weights at small sizes (`models/discovery/work.py`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from loraq.compose import load_rows
from loraq.config import Config, Recipe
from loraq.models.denoisers import joined, parts
from loraq.models.discovery.structure import structure_of
from loraq.models.discovery.work import Products, count_products
from loraq.models.family import find_family
from loraq.models.family_file import is_family_file, read_family
from loraq.models.layers import list_layers
from loraq.models.loading import latent_sizes, meta_denoiser
from loraq.models.source import pipeline_of
from loraq.quantization.model import QuantizedModel
from loraq.quantization.planned import planned_layers
from loraq.runner.layer_table import Entry, Inspection
from loraq.utils.console import size_text

TOKENS = 512
"""Tokens of a prompt where the pipeline's call has no such setting."""
POSITIONS = 1024
"""Positions of the latents where the files do not tell them, as of sound."""
SKIPPED = "quant.skip"


def inspect_model(overrides: Sequence[str]) -> Inspection:
    """The layers of the model that the overrides choose, under their method; reads no weights."""
    return inspect_row(load_rows(overrides)[-1])


def inspect_row(config: Config) -> Inspection:
    """The layers of a row's model under the row's recipe."""
    model, recipe = config.model, config.quant
    denoiser, family = meta_denoiser(model), find_family(model.family)
    kept = list_layers(denoiser, model.family, None if recipe is None else recipe.skip)
    quantized = None if recipe is None else QuantizedModel(planned_layers(kept, recipe))
    stored = {} if quantized is None else _stored_bits(quantized)
    names, entries, untraced = {layer.name for layer in kept}, [], ""
    sizes, tokens = latent_sizes(model), model.max_sequence_length or TOKENS
    positions = POSITIONS if sizes is None else math.prod(sizes)
    total: int | None = 0
    for part, network in parts(denoiser).items():
        structure = structure_of(network, family)
        untraced = structure.untraced
        products = None if untraced else count_products(network, family, positions, tokens)
        total = None if products is None or total is None else total + products.total
        for found in structure.layers:
            name = joined(part, found.name)
            module: Any = network.get_submodule(found.name)
            reason = "" if name in names else found.reason or SKIPPED
            if not found.quantizable:
                reason = found.reason
            bits = stored[name] / module.weight.numel() if name in stored else 16.0
            entries.append(
                Entry(
                    name,
                    joined(part, found.block.rpartition(".")[0]) if found.block else "",
                    found.role,
                    1,
                    found.shape,
                    found.input_id.removeprefix(f"{found.block}.") if found.block else "",
                    found.after_gelu,
                    reason,
                    bits,
                    module.weight.numel(),
                    _of(products, found.name),
                )
            )
    parameters = sum(p.numel() for p in denoiser.parameters())
    lines = _lines(config, denoiser, entries, parameters, quantized, recipe)
    if untraced:
        lines.append(f"shared inputs by name, and no FLOPs: a forward fails ({untraced})")
    elif total is None:
        lines.append("no FLOPs: they do not grow linearly with the size at small sizes")
    elif total:
        lines.append(
            f"{_tera(2 * total / len(parts(denoiser)))} TFLOP a forward, attention "
            f"{100 * (1 - sum(e.products or 0 for e in entries) / total):.1f} %, with {positions} "
            f"positions of latents{' (assumed)' if sizes is None else ''} and {tokens} tokens of "
            f"text{'' if model.max_sequence_length else ' (assumed)'}"
        )
    kinds = {type(network).__name__ for network in parts(denoiser).values()}
    title = f"{model.name}: {' and '.join(sorted(kinds))}"
    base = read_family(model.family).family if is_family_file(model.family) else model.family
    return Inspection(title, lines, entries, total, parameters, base)


def _tera(number: float) -> str:
    return f"{number / 1e12:,.0f}" if number >= 1e14 else f"{number / 1e12:.3g}"


def _amount(number: int) -> str:
    return f"{number / 1e9:.3f} B" if number >= 1e8 else f"{number / 1e6:.3f} M"


def _stored_bits(quantized: QuantizedModel) -> dict[str, float]:
    """Bits of every packed layer; layers that share R and a transform bear equal parts of them."""
    users = Counter(id(layer.transform) for layer in quantized.layers.values())
    bits = {}
    for name, layer in quantized.layers.items():
        own = [part for part in (layer.weight, layer.left) if part is not None]
        shared = [part for part in (layer.right, layer.transform) if part is not None]
        both = sum(part.nbytes for part in shared) / users[id(layer.transform)]
        bits[name] = 8 * (sum(part.nbytes for part in own) + both)
    return bits


def _of(products: Products | None, name: str) -> int | None:
    return None if products is None else products.layers.get(name, 0)


def _lines(
    config: Config,
    denoiser: Any,
    entries: Sequence[Entry],
    parameters: int,
    quantized: QuantizedModel | None,
    recipe: Recipe | None,
) -> list[str]:
    model = config.model
    lists = dict.fromkeys(entry.blocks for entry in entries if entry.blocks)
    counts = []
    for listed in lists:
        pattern = re.compile(rf"{re.escape(listed)}\.(\d+)\.")
        found = {match[1] for entry in entries if (match := pattern.match(entry.name))}
        counts.append(f"{len(found)} {listed}")
    chosen = [entry for entry in entries if not entry.reason]
    weights = sum(entry.weights for entry in chosen)
    method = "quantised by rule" if recipe is None else f"quantised by {config.method}"
    lines = [
        f"{pipeline_of(model).__name__}, family {model.family}: {', '.join(parts(denoiser)) or ''}"
        f"{' ' if any(parts(denoiser)) else ''}{_amount(parameters)} parameters in "
        f"{len(entries)} layers; blocks: {', '.join(counts)}",
        f"{method}: {len(chosen)} layers, {_amount(weights)} weights "
        f"({100 * weights / parameters:.1f} % of the parameters)",
    ]
    if quantized is not None and recipe is not None:
        branch = "no branch"
        if quantized.rank:
            branch = f"rank {quantized.rank}, {quantized.branch_bits_per_weight:.3f} bits of them"
        lines.append(
            f"{quantized.bits_per_weight:.3f} bits per quantised weight ({branch}); "
            f"{size_text(quantized.nbytes)} instead of {size_text(2 * weights)}"
        )
        if recipe.allocation.kind != "uniform":
            lines.append("allocation: the mean over layers is shown, whose ranks or bits differ")
    return lines
