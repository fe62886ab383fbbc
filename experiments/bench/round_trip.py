"""Save a quantised transformer with diffusers, load it in a new process, compare bitwise.

    python -m experiments.bench.round_trip [--model tiny_pixart] [--formats int4 …]
                                           [--branches 8 …] [--output FILE.json]

For every main format and branch: quantises with LQER (the stored layout does not depend on the
method), runs one forward with fixed inputs, saves with `save_pretrained`, and runs one forward in a
separate process from the packed checkpoint. Reports whether both outputs are bitwise equal, the
bytes of the packed tensors in the file compared with the stated bits per weight, seconds to load
and to the end of the first forward, and anonymous memory after loading (without mapped files),
compared with the 16-bit model.

Expected time: two minutes on 2 cores. Outcome (results/bench/round_trip_*.json): bitwise equal in
all 24 cases of both embedded models, the stated bytes, and 2 to 3 MB in memory instead of 63.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraq import recipe
from loraq.compose import load_rows
from loraq.errors import LoraqError, unknown
from loraq.models import list_layers, load_pipeline
from loraq.results import record
from loraq.utils import batch_invariance
from loraq.utils.memory import anonymous_bytes

MAIN = {
    "int4": ("int4", "int4"),
    "mxfp4": ("mxfp4_e2m1", "mxfp4_e2m1"),
    "nvfp4": ("nvfp4", "nvfp4"),
}
BRANCHES: dict[str, dict[str, tuple[str, str]]] = {
    "16": {"int4": ("fp16", "fp16"), "mxfp4": ("bf16", "bf16"), "nvfp4": ("bf16", "bf16")},
    "8": {
        "int4": ("int8", "int8"),
        "mxfp4": ("mxfp8_e4m3", "mxfp8_e4m3"),
        "nvfp4": ("mxfp8_e4m3", "mxfp8_e4m3"),
    },
    "6": {
        "int4": ("int6", "int6"),
        "mxfp4": ("mxfp6_e2m3", "mxfp6_e2m3"),
        "nvfp4": ("mxfp6_e2m3", "mxfp6_e2m3"),
    },
    "4": {
        "int4": ("int4", "int8"),
        "mxfp4": ("mxfp4_e2m1", "mxfp8_e4m3"),
        "nvfp4": ("nvfp4", "mxfp8_e4m3"),
    },
}
"""Bits of the branch's weights → main format → formats of branch weights and activations."""


def format_overrides(main: str, bits: str) -> list[str]:
    weight, activation = MAIN[main]
    left, branch = BRANCHES[bits][main]
    chosen = {"weight": weight, "activation": activation}
    chosen |= {"branch_weight": left, "branch_activation": branch}
    made = [f"format@quant.{operand}={name}" for operand, name in chosen.items()]
    for operand, name in chosen.items():
        if operand.endswith("activation") and name == "nvfp4":
            made.append(f"quant.{operand}.tensor_scale=token")
    return made


def output_hash(transformer: nn.Module) -> str:
    """sha256 of one forward's output for seeded inputs of the model's configuration."""
    config, g = transformer.config, torch.Generator().manual_seed(0)
    side = config.sample_size
    arguments: dict[str, Any] = {
        "hidden_states": torch.randn(2, config.in_channels, side, side, generator=g),
        "encoder_hidden_states": torch.randn(2, 16, config.caption_channels, generator=g),
        "timestep": torch.tensor([700.0, 300.0]),
    }
    if "PixArt" in type(transformer).__name__:
        arguments["added_cond_kwargs"] = {"resolution": None, "aspect_ratio": None}
    with torch.inference_mode():
        sample = transformer(**arguments).sample
    return hashlib.sha256(sample.float().numpy().tobytes()).hexdigest()


def load_here(folder: Path, name: str) -> dict[str, Any]:
    """Load a saved transformer of diffusers' class `name` and run it, in the child process."""
    import diffusers

    import loraq.diffusers_quantizer  # noqa: F401  registers the quantizer

    kind = getattr(diffusers, name)
    before, begin = anonymous_bytes(), time.perf_counter()
    transformer = kind.from_pretrained(folder).eval()
    loaded, held = time.perf_counter() - begin, anonymous_bytes() - before
    output = output_hash(transformer)
    return {
        "output": output,
        "load_seconds": loaded,
        "load_and_forward_seconds": time.perf_counter() - begin,
        "anonymous_bytes": held,
    }


def load_in_new_process(folder: Path, name: str) -> dict[str, Any]:
    """`load_here` in a new process."""
    command = [sys.executable, "-m", "experiments.bench.round_trip", "--here", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored_bytes(folder: Path, layers: Sequence[str]) -> int:
    """Bytes of the packed tensors of `layers` without biases, from the files' headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for key, entry in header.items():
            if key != "__metadata__" and _layer_of(key) in layers and not key.endswith(".bias"):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def _layer_of(key: str) -> str:
    return key.rpartition(".")[0]


def measure_combination(model: Any, main: str, bits: str) -> dict[str, Any]:
    """One row: quantise, save, load and compare one combination of formats."""
    from loraq.diffusers_quantizer import LoRaQConfig  # noqa: F401  registers the quantizer
    from loraq.quantization.quantizer import quantize_model

    transformer = load_pipeline(model, "cpu").transformer
    layers = list_layers(transformer, model.family)
    weights = sum(out * width for out, width in (layer.shape for layer in layers))
    made = quantize_model(
        transformer,
        layers,
        recipe("lqer", *format_overrides(main, bits)),
        None,
        None,
        None,
        model.family,
    )
    made.apply(transformer)
    here = output_hash(transformer)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transformer.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        stored = stored_bytes(folder, [layer.name for layer in layers])
        found = load_in_new_process(folder, type(transformer).__name__)
    stated = made.bits_per_weight * weights / 8
    return {
        "main": main,
        "branch_bits": int(bits),
        "identical": found.pop("output") == here,
        "rank": made.rank,
        "bits_per_weight": made.bits_per_weight,
        "stated_bytes": stated,
        "stored_bytes": stored,
        "file_bytes": size,
        **found,
    }


def measure_16_bit(model: Any) -> dict[str, Any]:
    """The unquantised transformer, saved in bfloat16 and loaded in its default type."""
    transformer = load_pipeline(model, "cpu").transformer
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transformer.to(torch.bfloat16).save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = load_in_new_process(folder, type(transformer).__name__)
    return {"main": "16-bit", "file_bytes": size, **found}


def row_summary(found: dict[str, Any]) -> str:
    """One printed line per row."""
    text = f"{found['main']:7s}"
    if "branch_bits" in found:
        off = found["stored_bytes"] / found["stated_bytes"] - 1
        same = "bitwise equal" if found["identical"] else "DIFFERENT"
        text += f" branch {found['branch_bits']:2d} bits, rank {found['rank']:2d}: {same}, "
        text += f"{found['stored_bytes'] / 1e6:.2f} MB packed ({off:+.2%} of the stated bytes), "
    return text + (
        f"file {found['file_bytes'] / 1e6:.1f} MB, loaded in {found['load_seconds']:.2f} s, "
        f"{found['anonymous_bytes'] / 1e6:.0f} MB in memory"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print every combination, write the record; LoraqError if outputs differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny_pixart")
    parser.add_argument("--formats", nargs="+", default=list(MAIN), metavar="FORMAT")
    parser.add_argument("--branches", nargs="+", default=list(BRANCHES), metavar="BITS")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument("--here", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    batch_invariance.configure_cpu_math()
    if options.here:
        print(json.dumps(load_here(Path(options.here[0]), options.here[1])))
        return
    for names, known, what in (
        (options.formats, MAIN, "main format"),
        (options.branches, BRANCHES, "bits of the branch"),
    ):
        for name in names:
            if name not in known:
                raise unknown(what, name, known)
    model = load_rows(["method=rtn", f"model={options.model}"])[-1].model
    plain = measure_16_bit(model)
    print(row_summary(plain), flush=True)
    rows = []
    for chosen in options.formats:
        for bits in options.branches:
            rows.append(measure_combination(model, chosen, bits))
            print(row_summary(rows[-1]), flush=True)
    if options.output is not None:
        record.save_findings(
            {"model": options.model, "sixteen_bit": plain, "rows": rows}, options.output
        )
    if not all(found["identical"] for found in rows):
        raise LoraqError("A loaded model's output differs from the saved model's.")


if __name__ == "__main__":
    main()
