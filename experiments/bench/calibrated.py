"""Peak memory of calibrated methods at full width, for models with few and with more blocks.

    python -m experiments.bench.calibrated pixart_sigma|sana_1_6b [--blocks 1 3]
                                           [--methods gptq smoothquant …] [--prompts 1] [--steps 20]
                                           [--size PIXELS] [--output FILE.json]

For each number of blocks, writes a synthetic snapshot (`make_fullsize`). For each method, runs the
command `loraq quantize` on it in a separate process with an empty cache: it encodes the calibration
captions, runs the 16-bit pipeline at the model's image size, stores the layers' inputs, and
quantises. The difference per block is the memory that grows with the model. Activations are stored
in files, whose bytes are reported separately. Rows in FILE.json are not measured again.

Memory can be measured on a busy machine. Expected time: two minutes per row of gptq, longer with
more blocks; far longer for svdquant, which computes a decomposition per smoothing candidate.
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
from .fullsize import bare_torch, run_quantize
from .saved_rows import SavedRows

METHODS = ("gptq", "smoothquant")
ACTIVATIONS = ("inputs", "moments")
GIB = 2**30


def cached_bytes(output: Path) -> int:
    """Bytes of the activation files in the output folder."""
    files = (path for product in ACTIVATIONS for path in output.glob(f"{product}/*/*.safetensors"))
    return sum(path.stat().st_size for path in files)


def measure_method(model: str, folder: Path, overrides: Sequence[str], bare: int) -> dict[str, Any]:
    """One method on one snapshot."""
    with tempfile.TemporaryDirectory() as output:
        row = run_quantize(model, folder, overrides, Path(output), bare)
        return row | {"activation_bytes": cached_bytes(Path(output))}


def _sort_key(row: dict[str, Any]) -> tuple[str, int]:
    """The order of rows in the record."""
    return row["method"], row["blocks"]


def row_summary(model: str, row: dict[str, Any]) -> str:
    """One printed line per row."""
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
    parser.add_argument("--size", type=int, metavar="PIXELS", help="default: the model's")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    for name in ("prompts", "steps", "size"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise LoraqError(f"--{name} {value} is below the limit 1. Set 1 or more.")
    settings = [f"calibration.prompts={options.prompts}", f"model.steps={options.steps}"]
    shared = {name: getattr(options, name) for name in ("prompts", "steps")}
    if options.size is not None:
        settings += [f"model.height={options.size}", f"model.width={options.size}"]
        shared["size"] = options.size
    rows = SavedRows(options.output, options.model, ("method", "blocks"), _sort_key, shared)
    missing = {
        blocks: [method for method in options.methods if not rows.has(method, blocks)]
        for blocks in options.blocks
    }
    bare = bare_torch() if any(missing.values()) else 0
    for blocks, methods in missing.items():
        if not methods:
            continue
        with tempfile.TemporaryDirectory() as folder:
            snapshot = Path(folder) / options.model
            make_fullsize.write_snapshot(options.model, snapshot, blocks=blocks)
            for method in methods:
                row = measure_method(options.model, snapshot, [f"method={method}", *settings], bare)
                row |= {"method": method, "blocks": blocks}
                print(row_summary(options.model, row), flush=True)
                rows.add(row)


if __name__ == "__main__":
    main()
