"""Time of quantising at full size by kind of operation, compared with lower bounds of the machine.

    python -m experiments.bench.floor pixart_sigma|sana_1_6b [--methods rtn lqer …] [--blocks 1]
                                      [--threads 2] [--output FILE.json]

Quantises blocks with a full-size model's shapes and synthetic weights (`make_fullsize`) in this
process. A dispatch mode times every tensor operation and assigns it to a kind: products,
decompositions (QR, eigenvectors, solves), rounding and all other elementwise operations. The rest
is time outside tensor operations (reading weights, hashing, packed files, Python). Also reports the
operations' FLOPs, and the bytes that they would read and write without a cache.

Two lower bounds ("floors"), from this machine's rates on a large float32 product and a large copy:
- FLOPs: those of the method, all at the rate of the product;
- bytes: weights read once in 16 bits and packed ones written, at the rate of the copy.

Expected time: under a minute per method and model on 2 cores.
Outcome: results/bench/floor_*.json, docs/speed.md.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from loraq import recipe
from loraq.compose import load_rows
from loraq.config import Recipe
from loraq.models import Layer, list_layers
from loraq.quantization.quantizer import quantize_model
from loraq.results import record
from loraq.utils import batch_invariance

from . import make_fullsize
from .fullsize import METHODS
from .timing import call_seconds

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm", "_linear_pointwise"}
DECOMPOSITIONS = {"linalg_qr", "_linalg_eigh", "_linalg_solve_ex"}
KINDS = ("products", "decompositions", "rounding", "rest")
WIDE = 1 << 27
"""Elements of the copy that measures memory bandwidth: far larger than any cache."""


def operation_flops(name: str, tensors: Sequence[Tensor], out: Tensor) -> float:
    """FLOPs of one operation: textbook counts for decompositions, 0 for elementwise ones."""
    if name in PRODUCTS:
        first = tensors[1 if name in ("addmm", "baddbmm") else 0]
        return 2.0 * out.numel() * first.shape[-1]
    if name not in DECOMPOSITIONS:
        return 0.0
    *batch, m, n = tensors[0].shape
    count = float(torch.Size(batch).numel())
    if name == "linalg_qr":  # R, then explicit Q (Golub & Van Loan, 5.2)
        return count * 4 * (m * n * n - n**3 / 3)
    if name == "_linalg_eigh":  # tridiagonalise, eigenvectors, back-transform (8.3)
        return count * 9 * n**3
    return count * (2 * n**3 / 3 + 2 * n * n * tensors[1].shape[-1])


class OperationProfile(TorchDispatchMode):
    """Context manager: seconds, FLOPs and bytes of every tensor operation, by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begin = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        spent = time.perf_counter() - begin
        name = func.overloadpacket.__name__
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        self.seconds[name] += spent
        if not func.is_view and made:
            self.bytes[name] += sum(t.numel() * t.element_size() for t in (*given, *made))
            self.flops[name] += operation_flops(name, given, made[0])
        return out


def operation_kind(name: str) -> str:
    """The kind of an operation, one of the first three KINDS."""
    if name in PRODUCTS:
        return "products"
    return "decompositions" if name in DECOMPOSITIONS else "rounding"


def rate_of(call: Callable[[], Any], amount: float, repeats: int = 7) -> float:
    """`amount` per second, from the median time of `repeats` calls."""
    call()
    return amount / median(call_seconds(call, torch.device("cpu")) for _ in range(repeats))


def machine_rates() -> dict[str, float]:
    """FLOP/s of a float32 product with the faster library, bytes/s of a copy (read and write)."""
    x, w = torch.randn(4096, 2304), torch.randn(2304, 2304)
    count = 2.0 * x.numel() * w.shape[0]
    rates = [rate_of(lambda: x @ w.T, count)]
    if batch_invariance.use_onednn("cpu"):
        rates.append(rate_of(lambda: batch_invariance.onednn_product(x, w), count))
    source, target = torch.ones(WIDE), torch.empty(WIDE)
    return {"flops": max(rates), "bytes": rate_of(lambda: target.copy_(source), 8.0 * WIDE)}


def measure_method(
    model: torch.nn.Module, layers: Sequence[Layer], chosen: Recipe, rates: dict[str, float]
) -> dict[str, Any]:
    """One row: seconds, FLOPs and bytes by kind, the slowest operations, the lower bounds."""
    weights = sum(out * width for out, width in (layer.shape for layer in layers))
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        made = quantize_model(model, layers, chosen, checkpoint_dir=Path(folder), progress=None)
        plain = time.perf_counter() - begin
        stored = made.nbytes
        del made
    profile = OperationProfile()
    with tempfile.TemporaryDirectory() as folder, profile:
        begin = time.perf_counter()
        quantize_model(model, layers, chosen, checkpoint_dir=Path(folder), progress=None)
        watched = time.perf_counter() - begin
    kinds: dict[str, dict[str, float]] = {
        name: {"seconds": 0.0, "flops": 0.0, "bytes": 0.0} for name in KINDS
    }
    for name in profile.seconds:
        row = kinds[operation_kind(name)]
        row["seconds"] += profile.seconds[name]
        row["flops"] += profile.flops[name]
        row["bytes"] += profile.bytes[name]
    kinds["rest"]["seconds"] = max(0.0, plain - sum(profile.seconds.values()))
    longest = sorted(profile.seconds, key=lambda name: -profile.seconds[name])[:8]
    least = {
        "flops": sum(row["flops"] for row in kinds.values()) / rates["flops"],
        "bytes": (2 * weights + stored) / rates["bytes"],
    }
    return {
        "seconds": plain,
        "watched_seconds": watched,
        "weights": weights,
        "kinds": kinds,
        "longest": {name: profile.seconds[name] for name in longest},
        "floor_seconds": least,
        "over_floor": plain / max(least.values()),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a line per method and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=make_fullsize.CONFIGS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    batch_invariance.configure_cpu_math()
    torch.set_num_threads(options.threads)
    model = make_fullsize.synthetic_model(options.model, options.blocks).half()
    family = load_rows([f"model={options.model}", "method=rtn"])[-1].model.family
    layers = list_layers(model, family)
    rates = machine_rates()
    print(f"a product: {rates['flops'] / 1e9:.0f} GFLOP/s, a copy: {rates['bytes'] / 1e9:.1f} GB/s")
    quantize_model(model, layers, recipe("rtn"), progress=None)  # warm-up: lazy imports
    rows = {}
    for name in options.methods:
        rows[name] = measure_method(model, layers, recipe(name), rates)
        spent = rows[name]["kinds"]
        shares = ", ".join(f"{k} {spent[k]['seconds']:.2f}" for k in KINDS)
        over = f"{rows[name]['over_floor']:.1f} times the floor"
        print(f"{name}: {rows[name]['seconds']:.2f} s, {over}; {shares}", flush=True)
    if options.output is not None:
        settings = {"model": options.model, "blocks": options.blocks, "threads": options.threads}
        record.save_findings({"settings": settings, "rates": rates, "rows": rows}, options.output)


if __name__ == "__main__":
    main()
