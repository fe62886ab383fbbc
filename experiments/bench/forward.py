"""Forward time of one full-size transformer block and of its layers: bf16, torchao, and LoRaQ.

    python -m experiments.bench.forward pixart_sigma|sana_1_6b [--ways bf16 int4 …] [--repeats 7]
                                        [--compute emulate|auto|triton] [--dtype bfloat16|float32]
                                        [--device cpu|cuda] [--threads 2] [--output FILE.json]

One block with the published widths and synthetic weights (`make_fullsize`) gets the inputs of one
image at 1024 px: 4096 tokens (PixArt-Σ) or 1024 (SANA). Every way is a separate copy of the block;
all run in one process in alternating order, so that other load affects all. Reports median times,
the median over repeats of each way's time divided by the first way's, and the bytes of the block's
quantised layers. torchao runs in eager mode.

Expected time: four minutes per model on 2 idle cores. Outcome: docs/speed.md.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq import recipe, set_compute
from loraq.config import Recipe
from loraq.errors import LoraqError, unknown
from loraq.models import Layer, list_layers
from loraq.quantization.quantizer import quantize_model
from loraq.results import record
from loraq.utils import batch_invariance
from loraq.utils.memory import reused_heap

from .make_fullsize import CONFIGS, synthetic_model
from .timing import alternate

FAMILIES = {"pixart_sigma": "pixart_sigma", "sana_1_6b": "sana"}
TEXT_TOKENS = 300
MX = [f"format@quant.{operand}=mxfp4_e2m1" for operand in ("weight", "activation")]
MX += [f"format@quant.{operand}=mxfp8_e4m3" for operand in ("branch_weight", "branch_activation")]
INT8 = [f"format@quant.{operand}=int8" for operand in ("weight", "activation")]
BF16_BRANCH = [f"format@quant.{o}=bf16" for o in ("branch_weight", "branch_activation")]
RECIPES = {
    "int4": ("lqer",),
    "int4, W4A8 branch": ("lqer", "format@quant.branch_weight=int4"),
    "int4, bf16 branch": ("lqer", *BF16_BRANCH),
    "int4, no branch": ("rtn",),
    "mxfp4": ("lqer", *MX),
    "int8, no branch": ("rtn", *INT8),
}
TORCHAO = {
    "torchao int8 + int4 g64": "int4",
    "torchao int8 + int8": "int8",
}
WAYS = ("bf16", "float32", *RECIPES, *TORCHAO)


def one_block(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """The transformer with one block of synthetic weights, and the arguments of its forward."""
    model = synthetic_model(name, blocks=1).eval().requires_grad_(False)
    config, g = model.config, torch.Generator().manual_seed(0)
    side = config.sample_size
    arguments: dict[str, Any] = {
        "hidden_states": torch.randn(1, config.in_channels, side, side, generator=g),
        "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, config.caption_channels, generator=g),
        "timestep": torch.tensor([500.0]),
    }
    if name == "pixart_sigma":
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    return model, arguments


def inputs_of(model: nn.Module, layers: Sequence[str], arguments: dict[str, Any]) -> dict[str, Any]:
    """(args, kwargs) of the block and its layers in one forward, by module name."""
    seen: dict[str, Any] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: seen.update({name: (args, kwargs)})

    names = ["transformer_blocks.0", *layers]
    hooks = [
        model.get_submodule(n).register_forward_pre_hook(keep(n), with_kwargs=True) for n in names
    ]
    model(**arguments)
    for hook in hooks:
        hook.remove()
    return seen


def to_device(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Nested tensors on the device, floating-point ones as `dtype`."""
    if isinstance(value, Tensor):
        return value.to(device, dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: to_device(entry, device, dtype) for key, entry in value.items()}
    return tuple(to_device(v, device, dtype) for v in value) if isinstance(value, tuple) else value


def quantize_with_torchao_(model: nn.Module, layers: Sequence[Layer], weight: str) -> None:
    """Quantise the same linears in place; torchao does not support convolutions (16-bit)."""
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        quantize_,
    )
    from torchao.quantization.granularity import PerGroup

    config: Any = Int8DynamicActivationInt8WeightConfig()
    if weight == "int4":
        config = Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(64)
        )
    names = {layer.name for layer in layers}
    quantize_(model, config, filter_fn=lambda m, name: name in names and isinstance(m, nn.Linear))


def build_way(
    way: str, block: nn.Module, dtype: torch.dtype, family: str, compute: str
) -> tuple[nn.Module, int | None]:
    """A copy of the model in one way, and the bytes of its quantised layers (None for torchao)."""
    model = nn.Module.to(copy.deepcopy(block), dtype)
    layers = list_layers(model, family)
    weights = sum(out * width for out, width in (layer.shape for layer in layers))
    if way in TORCHAO:
        quantize_with_torchao_(model, layers, TORCHAO[way])
        return model, None
    if way not in RECIPES:
        return model, weights * (4 if way == "float32" else 2)
    chosen: Recipe = recipe(*RECIPES[way])
    made = quantize_model(model, layers, chosen, progress=None)
    made.apply(model)
    set_compute(model, compute)
    return model, round(made.bits_per_weight * weights / 8)


def markdown_table(
    title: str, found: dict[str, dict[str, Any]], size: dict[str, int | None]
) -> str:
    """The ways as a Markdown table, in milliseconds."""
    lines = [f"| {title} | ms | ratio | MB |", "|---|---:|---:|---:|"]
    for way, row in found.items():
        held = "" if size[way] is None else f"{size[way] / 1e6:.1f}"
        milliseconds = 1000 * row["median_seconds"]
        lines.append(f"| {way} | {milliseconds:.1f} | {row['ratio']:.2f} | {held} |")
    return "\n".join(lines)


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help=" or ".join(CONFIGS))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), metavar="WAY")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--compute", default="emulate")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for way in options.ways:
        if way not in WAYS:
            raise unknown("way", way, WAYS)
    if options.repeats < 1:
        raise LoraqError(f"--repeats {options.repeats} is below the limit 1. Set 1 or more.")
    batch_invariance.configure_cpu_math()
    torch.set_num_threads(options.threads)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    block, call = one_block(options.model)
    family = FAMILIES[options.model]
    layers = [layer.name for layer in list_layers(block, family)]
    inputs = inputs_of(block, layers, call)
    models, size, types = {}, {}, {}
    for way in options.ways:
        types[way] = {"bf16": torch.bfloat16, "float32": torch.float32}.get(way, dtype)
        models[way], size[way] = build_way(way, block, types[way], family, options.compute)
        models[way].to(device)
    found = {}
    for name in ("transformer_blocks.0", *layers):
        calls = {}
        for way, model in models.items():
            given, named = to_device(inputs[name], device, types[way])
            calls[way] = functools.partial(model.get_submodule(name), *given, **named)
        with reused_heap():  # as image generation does
            found[name] = alternate(calls, options.repeats, device)
        print(f"{markdown_table(name, found[name], size)}\n", flush=True)
    if options.output is not None:
        settings = {**vars(options), "output": None, "recipes": RECIPES, "bytes": size}
        record.save_findings({"settings": settings, "modules": found}, options.output)
        print(f"written to {options.output}")


if __name__ == "__main__":
    main()
