"""Save a quantised transformer through diffusers, load it in a fresh process, compare to the bit.

    python -m experiments.bench.round_trip [--model tiny_pixart] [--formats int4 …]
                                           [--branches 8 …] [--output FILE.json]

For every main format and branch: LQER (what is stored does not depend on how it was found), one
forward with fixed inputs here, `save_pretrained`, one forward in a process of its own, whose folder
holds the packed checkpoint alone. Printed and recorded: whether both outputs have the same bits,
the bytes of the packed tensors in the file beside the stated bits per weight, seconds to load and
to the end of the first forward, and anonymous memory that loading took (mapped files do not count),
beside the 16-bit model's.

Expected time: two minutes on 2 cores. Found (results/bench/round_trip_*.json): the same bits in all
24 cases of both embedded models, the stated bytes, and 2 to 3 MB held against 63.
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
"""Bits of the branch's weights → main format → formats of its weights and of its activations."""


def overrides(main: str, bits: str) -> list[str]:
    weight, activation = MAIN[main]
    left, branch = BRANCHES[bits][main]
    chosen = {"weight": weight, "activation": activation}
    chosen |= {"branch_weight": left, "branch_activation": branch}
    made = [f"format@quant.{operand}={name}" for operand, name in chosen.items()]
    for operand, name in chosen.items():
        if operand.endswith("activation") and name == "nvfp4":
            made.append(f"quant.{operand}.tensor_scale=token")
    return made


def output_of(transformer: nn.Module) -> str:
    """sha256 of one forward's output for inputs that follow from the model's configuration."""
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
    """Load a saved transformer of diffusers' class `name` and run it: the child process's part."""
    import diffusers

    import loraq.diffusers_quantizer  # noqa: F401  registers the quantiser

    kind = getattr(diffusers, name)
    before, begin = anonymous_bytes(), time.perf_counter()
    transformer = kind.from_pretrained(folder).eval()
    loaded, held = time.perf_counter() - begin, anonymous_bytes() - before
    output = output_of(transformer)
    return {
        "output": output,
        "load_seconds": loaded,
        "load_and_forward_seconds": time.perf_counter() - begin,
        "anonymous_bytes": held,
    }


def load_apart(folder: Path, name: str) -> dict[str, Any]:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "experiments.bench.round_trip", "--here", str(folder), name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def stored_bytes(folder: Path, layers: Sequence[str]) -> int:
    """Of the packed tensors of `layers`, biases apart, by the files' own headers."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for key, entry in header.items():
            if key != "__metadata__" and _owner(key) in layers and not key.endswith(".bias"):
                total += entry["data_offsets"][1] - entry["data_offsets"][0]
    return total


def _owner(key: str) -> str:
    return key.rpartition(".")[0]


def row(model: Any, main: str, bits: str) -> dict[str, Any]:
    """One combination, from the 16-bit pipeline on."""
    from loraq.diffusers_quantizer import LoRaQConfig  # noqa: F401  registers the quantiser
    from loraq.quantization.quantizer import quantize_model

    transformer = load_pipeline(model, "cpu").transformer
    layers = list_layers(transformer, model.family)
    weights = sum(out * width for out, width in (layer.shape for layer in layers))
    made = quantize_model(
        transformer, layers, recipe("lqer", *overrides(main, bits)), None, None, None, model.family
    )
    made.apply(transformer)
    here = output_of(transformer)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transformer.save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        stored = stored_bytes(folder, [layer.name for layer in layers])
        found = load_apart(folder, type(transformer).__name__)
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


def sixteen_bit(model: Any) -> dict[str, Any]:
    """The unquantised transformer, saved in 16 bits and loaded in the type that it runs in."""
    transformer = load_pipeline(model, "cpu").transformer
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        transformer.to(torch.bfloat16).save_pretrained(folder)
        size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        found = load_apart(folder, type(transformer).__name__)
    return {"main": "16-bit", "file_bytes": size, **found}


def line(found: dict[str, Any]) -> str:
    """One row for a reader."""
    text = f"{found['main']:7s}"
    if "branch_bits" in found:
        off = found["stored_bytes"] / found["stated_bytes"] - 1
        same = "same bits" if found["identical"] else "OTHER BITS"
        text += f" branch {found['branch_bits']:2d} bits, rank {found['rank']:2d}: {same}, "
        text += f"{found['stored_bytes'] / 1e6:.2f} MB packed ({off:+.2%} of what is stated), "
    return text + (
        f"file {found['file_bytes'] / 1e6:.1f} MB, loaded in {found['load_seconds']:.2f} s, "
        f"{found['anonymous_bytes'] / 1e6:.0f} MB held"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Every combination, printed as it is found; ends with an error where bits differ."""
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
    plain = sixteen_bit(model)
    print(line(plain), flush=True)
    rows = []
    for chosen in options.formats:
        for bits in options.branches:
            rows.append(row(model, chosen, bits))
            print(line(rows[-1]), flush=True)
    if options.output is not None:
        record.save_findings(
            {"model": options.model, "sixteen_bit": plain, "rows": rows}, options.output
        )
    if not all(found["identical"] for found in rows):
        raise LoraqError("A loaded model computes other bits than the one that was saved.")


if __name__ == "__main__":
    main()
