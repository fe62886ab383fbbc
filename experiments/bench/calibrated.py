"""Peak memory of calibrated methods at full width, for models of few and of more blocks.

    python -m experiments.bench.calibrated pixart_sigma|sana_1_6b [--blocks 1 3]
                                           [--methods gptq smoothquant …] [--prompts 1] [--steps 20]
                                           [--output FILE.json]

For each number of blocks a synthetic snapshot is written (`make_fullsize`), and for each method the
command `loraq quantize` runs on it in a process of its own, from an empty cache: it encodes the
calibration captions, runs the 16-bit pipeline at the model's own picture size, keeps what the
layers read, and quantises. What a block more takes is what would grow with the model; activations
lie in files, whose bytes are counted apart. Rows that FILE.json holds are kept.

Memory needs no idle machine. Expected time: two minutes a row of gptq, longer with more blocks; far
longer for svdquant, whose every trial of a smoothing is a decomposition.
Outcome: results/bench/calibrated_*.json, docs/speed.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError

from . import make_fullsize
from .fullsize import bare_torch, quantise
from .kept import KeptRows

METHODS = ("gptq", "smoothquant")
ACTIVATIONS = ("inputs", "moments")
GIB = 2**30


def cached_bytes(output: Path) -> int:
    """Bytes of activations that lie in the output folder."""
    files = (path for product in ACTIVATIONS for path in output.glob(f"{product}/*/*.safetensors"))
    return sum(path.stat().st_size for path in files)


def measure(model: str, folder: Path, overrides: Sequence[str], bare: int) -> dict[str, Any]:
    """One method on one snapshot."""
    with tempfile.TemporaryDirectory() as output:
        row = quantise(model, folder, overrides, Path(output), bare)
        return row | {"activation_bytes": cached_bytes(Path(output))}


def _place(row: dict[str, Any]) -> tuple[str, int]:
    """Where a row stands in the table, whenever it was measured."""
    return row["method"], row["blocks"]


def summary(model: str, row: dict[str, Any]) -> str:
    """One line for a reader who waits."""
    memory, cached = row["peak_above_torch_bytes"] / GIB, row["activation_bytes"] / GIB
    line = f"{model} {row['blocks']} blocks {row['method']}: {row['wall_seconds']:.0f} s, "
    return line + f"{memory:.2f} GiB above torch; {cached:.2f} GiB of activations in files"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="pixart_sigma or sana_1_6b")
    parser.add_argument("--blocks", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--prompts", type=int, default=1, help="calibration captions")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for name in ("prompts", "steps"):
        if (value := getattr(options, name)) < 1:
            raise LoraqError(f"--{name} {value} is below the limit 1. Give 1 or more.")
    settings = [f"calibration.prompts={options.prompts}", f"model.steps={options.steps}"]
    bare = bare_torch()
    shared = {name: getattr(options, name) for name in ("prompts", "steps")}
    kept = KeptRows(options.output, options.model, ("method", "blocks"), _place, shared)
    for blocks in options.blocks:
        with tempfile.TemporaryDirectory() as folder:
            snapshot = Path(folder) / options.model
            make_fullsize.write(options.model, snapshot, blocks=blocks)
            for method in options.methods:
                if kept.has(method, blocks):
                    continue
                row = measure(options.model, snapshot, [f"method={method}", *settings], bare)
                row |= {"method": method, "blocks": blocks}
                print(summary(options.model, row), flush=True)
                kept.add(row)


if __name__ == "__main__":
    main()
