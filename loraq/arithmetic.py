"""Images whose bits do not depend on their batch.

4-bit activations turn a last bit into another code, and a denoising trajectory turns that into
another image: without this, batch sizes 1 and 8 give images as far apart as the model is from its
reference (experiments/bench/batch_size.py). Intel's processors get
matrix products that sum in one order however many rows come at once; where a probe finds that they
do not (MKL on AMD's processors ignores the wish), the pipeline is called with one image at a time,
and quantised layers multiply by oneDNN, which is the quicker one there.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MODE = "AUTO,STRICT"
"""Intel MKL's conditional numerical reproducibility: the best code, one summing order."""
SPINS = "1000"


def settle() -> None:
    """Ask for row-invariant products; MKL listens until the process's first product.

    And that threads which wait spin for microseconds and then sleep, which OpenMP hears before
    torch is imported. As it comes they spin on, and two runs on one machine take many times as
    long; sleeping at once, one run alone takes a third longer (experiments/LOG.md).
    """
    os.environ.setdefault("MKL_CBWR", MODE)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def at_once(images: int, device: str) -> int:
    """How many of a batch's images may go through a pipeline together: all, or one.

    A GPU's products depend on the batch too; there it stays whole, and its size is in the keys.
    """
    return images if device != "cpu" or row_invariant() else 1


def by_onednn(device: str) -> bool:
    """Whether float32 products on `device` are quicker by `onednn_product` than as they come."""
    return device == "cpu" and not row_invariant() and _has_onednn()


def onednn_product(x: Tensor, w_OI: Tensor) -> Tensor:
    """x·Wᵀ [..., out], by what PyTorch's compiler calls for linears (it has no public name)."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")


def in_bfloat16(device: str, dtype: str) -> bool:
    """Whether compute=auto multiplies a model of this type in bfloat16 on this device."""
    return device == "cpu" and dtype == "bfloat16" and bfloat16_units()


@functools.cache
def bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 by itself (AVX-512 BF16, AMX, or Arm's BF16)."""
    import torch

    tell = getattr(torch.cpu, "get_capabilities", dict)
    return any(tell().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def _has_onednn() -> bool:
    """Whether it is there and multiplies, also nothing (a probe)."""
    import torch

    x, w = torch.eye(3, 5), torch.eye(4, 5)
    try:
        return torch.equal(onednn_product(x, w), x @ w.T) and onednn_product(x[:0], w).shape == (
            0,
            4,
        )
    except (AttributeError, RuntimeError):
        return False


def row_invariant(threads: int | None = None) -> bool:
    """Whether float32 products here give the same bits for few rows as for many (a probe).

    threads: of the products, by default as many as PyTorch takes now.
    """
    import torch

    return _row_invariant(torch.get_num_threads() if threads is None else threads)


@functools.cache
def _row_invariant(threads: int) -> bool:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _products_are_row_invariant()
    finally:
        torch.set_num_threads(before)


def _products_are_row_invariant() -> bool:
    import torch

    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for rows, part, inner, outer in ((16, 2, 384, 2304), (1024, 128, 1536, 384)):
        x, w = random(rows, inner), random(outer, inner)
        if not torch.equal((x @ w.T)[:part], x[:part] @ w.T):
            return False
    return True
