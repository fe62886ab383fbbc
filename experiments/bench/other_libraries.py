"""Score the embedded model quantised by other libraries, beside this one's rows, on a CPU.

    python -m experiments.bench.other_libraries [--only sdnq_int4 …] [--output FILE.json]

Needs the extra `engines`. Quantises the same layers as `experiment=demo` with SDNQ, torchao,
bitsandbytes, quanto and GGUF, generates the demo's 32 captions with the same seeds, and measures
the images as `loraq score` does. Memory is what is really held. Most of these methods round weights
alone and keep activations in 16 bits or more; the rows of this library round both to 4 bits, except
the branch. This library's rows, and the 16-bit images, are those of OUTPUTS/results/demo
(`loraq run experiment=demo`). Each finished row is kept in OUTPUTS/bench/other_libraries.

Expected time: half an hour on 2 cores. Outcome: results/bench/other_libraries.json.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import loraq
from loraq.compose import load_rows
from loraq.errors import unknown
from loraq.models import list_layers, load_pipeline
from loraq.models.denoisers import denoiser_of
from loraq.results import record as records
from loraq.results.record import Record
from loraq.results.tables.tables import compare_rows
from loraq.runner.beside import images_of, read_beside, sixteen_bit
from loraq.runner.store import Store
from loraq.utils import batch_invariance

MODEL = "tiny_pixart"
SETTINGS = [f"model={MODEL}", "data.count=32"]
METRICS = ("psnr", "lpips", "ssim")
BASELINE = "loraq_best"
Names = Sequence[str]


@dataclass(frozen=True)
class Method:
    """How a library quantises the layers `names` of a network in place.

    activations: how it holds inputs of these layers when it multiplies.
    """

    label: str
    package: str
    quantize: Callable[[nn.Module, Names], None]
    activations: str = "16 bits"


def each_linear(make: Callable[[nn.Linear], nn.Module], network: nn.Module, names: Names) -> None:
    """Replace every named layer by what `make` returns for it."""
    for name in names:
        network.set_submodule(name, make(network.get_submodule(name)), strict=True)


def sdnq(network: nn.Module, names: Names, **options: Any) -> None:
    """SDNQ's own `sdnq_post_load_quant` with all other layers left out."""
    from sdnq.quantizer import sdnq_post_load_quant

    others = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    kept = [form for name in others if name not in names for form in (name, f".{name}.")]
    sdnq_post_load_quant(
        network,
        modules_to_not_convert=kept,
        add_skip_keys=False,
        torch_dtype=torch.float32,
        **options,
    )


def torchao(network: nn.Module, names: Names, config: str, **options: Any) -> None:
    """torchao's `quantize_` with a configuration of its own."""
    from torchao import quantization

    chosen = set(names)
    quantization.quantize_(
        network,
        getattr(quantization, config)(**options),
        filter_fn=lambda _module, name: name in chosen,
    )


def bnb_4bit(linear: nn.Linear, kind: str) -> nn.Module:
    """bitsandbytes' 4-bit layer: blocks of 64, scales in float32."""
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type=kind
    )
    made.weight = bitsandbytes.nn.Params4bit(
        linear.weight.data, requires_grad=False, quant_type=kind
    )
    made.bias = linear.bias
    return made.to("cpu")  # which quantises


def bnb_8bit(linear: nn.Linear) -> nn.Module:
    """bitsandbytes' LLM.int8(): activations are rounded per row, with outliers in 16 bits."""
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(
        linear.in_features, linear.out_features, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(
        linear.weight.data, requires_grad=False, has_fp16_weights=False
    )
    made.bias = linear.bias
    return made.to("cpu")


def quanto(network: nn.Module, names: Names, weights: str) -> None:
    """quanto's `quantize` and `freeze`; with 4 bits it compiles C++ when it first computes."""
    from optimum.quanto import freeze, quantize

    quantize(network, weights=weights, include=list(names))
    freeze(network)


def gguf(linear: nn.Linear, kind: str) -> nn.Module:
    """diffusers' layer for GGUF, with a weight that llama.cpp's Python package quantises."""
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    chosen = GGMLQuantizationType[kind]
    packed = torch.from_numpy(quantize(linear.weight.detach().numpy(), chosen))
    made = GGUFLinear(linear.in_features, linear.out_features, True, torch.float32)
    made.weight, made.bias = GGUFParameter(packed, quant_type=chosen), linear.bias
    return made


def _of(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return functools.partial(function, *arguments, **options)


METHODS: Mapping[str, Method] = {
    "sdnq_int4": Method("SDNQ int4", "sdnq", _of(sdnq, weights_dtype="int4")),
    "sdnq_svd": Method(
        "SDNQ int4, SVD rank 32", "sdnq", _of(sdnq, weights_dtype="int4", use_svd=True, svd_rank=32)
    ),
    "torchao_int4": Method(
        "torchao int4 (held in int8)",
        "torchao",
        _of(torchao, config="IntxWeightOnlyConfig", weight_dtype=torch.int4),
    ),
    "torchao_int8": Method("torchao int8", "torchao", _of(torchao, config="Int8WeightOnlyConfig")),
    "torchao_w8a8": Method(
        "torchao int8, dynamic int8 activations",
        "torchao",
        _of(torchao, config="Int8DynamicActivationInt8WeightConfig"),
        "8 bits",
    ),
    "bnb_nf4": Method(
        "bitsandbytes nf4", "bitsandbytes", _of(each_linear, _of(bnb_4bit, kind="nf4"))
    ),
    "bnb_fp4": Method(
        "bitsandbytes fp4", "bitsandbytes", _of(each_linear, _of(bnb_4bit, kind="fp4"))
    ),
    "bnb_int8": Method("bitsandbytes int8", "bitsandbytes", _of(each_linear, bnb_8bit), "8 bits"),
    "quanto_int4": Method("quanto int4", "optimum-quanto", _of(quanto, weights="qint4")),
    "quanto_int8": Method("quanto int8", "optimum-quanto", _of(quanto, weights="qint8")),
    "gguf_q4_0": Method("GGUF Q4_0", "gguf", _of(each_linear, _of(gguf, kind="Q4_0"))),
    "gguf_q8_0": Method("GGUF Q8_0", "gguf", _of(each_linear, _of(gguf, kind="Q8_0"))),
}
"""K-quants are left out: the `gguf` package reads Q4_K and does not write it."""


def quantized_pipeline(name: str) -> Any:
    """The embedded pipeline with the layers that `experiment=demo` quantises, by a library."""
    config = load_rows(["method=rtn", f"model={MODEL}"])[-1]
    pipe = load_pipeline(config.model, "cpu")
    denoiser = denoiser_of(pipe)
    assert config.quant is not None
    layers = list_layers(denoiser, config.model.family, config.quant.skip)
    with torch.no_grad():
        METHODS[name].quantize(denoiser, [layer.name for layer in layers])
    return pipe


def score_method(name: str, output: Path, against: Path) -> Record:
    """The record of a method's row; read if it was made before."""
    path = output / "bench" / "other_libraries" / f"{name}.json"
    if not path.is_file():
        pipe = quantized_pipeline(name)
        found = loraq.score(pipe, *SETTINGS, f"output={output}", against=against, name=name)
        print(found.text(), flush=True)
        records.save_record(found.record, path)
    return records.load_record(path)


def whole_bits(budget: Mapping[str, Any], weights: int) -> tuple[float, float]:
    """(share of the weights that are quantised, bits per weight of a denoiser of `weights`).

    The other weights count as 16 bits; the embedded model holds them in 32.
    """
    quantized = round(8 * budget["nbytes"] / budget["bits_per_weight"])
    return quantized / weights, (8 * budget["nbytes"] + 16 * (weights - quantized)) / weights


def table_row(record: Record, base: Record, rows: Sequence[Record], weights: int) -> dict[str, Any]:
    """One row of the table, from a record of this or another library."""
    method = METHODS.get(record.row)
    share, bits = whole_bits(record.budget, weights)
    compared = {name: compare_rows(rows, base, name) for name in METRICS}
    found: dict[str, Any] = {
        "row": record.row,
        "label": record.label if method is None else method.label,
        "library": "loraq" if method is None else method.package,
        "activations": "4 bits" if method is None else method.activations,
        "bits_per_weight": record.budget["bits_per_weight"],
        "nbytes": record.budget["nbytes"],
        "quantized_share": share,
        "denoiser_bits_per_weight": bits,
        "kinds": record.budget.get("held", {}).get("kinds"),
        "seconds_per_image": record.timings["images"] / len(record.images["names"]),
    }
    for name in METRICS:
        entry, cell = record.metrics[name], compared[name].get(record.row)
        found[name] = {part: entry[part] for part in ("value", "lo", "hi")}
        if cell is not None:
            found[name] |= {"paired": [cell.value, cell.lo, cell.hi], "claim": cell.mark}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Score the methods, print them beside the committed rows, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--outputs", type=Path, default=Path("outputs"), metavar="FOLDER")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for name in options.only:
        if name not in METHODS:
            raise unknown("method", name, METHODS)
    batch_invariance.configure_cpu_math()
    demo, _ = read_beside([options.outputs / "results" / "demo"])
    original = sixteen_bit(demo)
    assert original is not None
    against = images_of(original, Store(options.outputs))
    scored = [score_method(name, options.outputs, against) for name in options.only]
    rows = [*scored, *(record for record in demo if record is not original)]
    base = next(record for record in rows if record.row == BASELINE)
    others = [record for record in rows if record is not base]
    weights = scored[0].budget["held"]["weights"]
    found = {
        "baseline": base.label,
        "weights": weights,
        "libraries": {
            method.package: importlib.metadata.version(method.package)
            for method in METHODS.values()
        },
        "rows": sorted(
            (table_row(record, base, others, weights) for record in rows),
            key=lambda row: row["denoiser_bits_per_weight"],
        ),
    }
    for row in found["rows"]:
        print(f"{row['label']:42s} {row['bits_per_weight']:6.3f} {row['psnr']['value']:6.2f} dB")
    if options.output is not None:
        records.save_findings(found, options.output)


if __name__ == "__main__":
    main()
