"""Images whose bits do not depend on the batch they were generated in.

4-bit activations turn a last-bit difference into another code, and a denoising trajectory turns
that into another image: without this module, batch sizes 1 and 8 give images as far apart as the
quantised model is from its reference (experiments/bench/batch_size.py). On Intel processors, MKL is
asked for matrix products whose summation order does not depend on the number of rows. Where a probe
finds that it does (MKL ignores the setting on AMD processors), the pipeline is called with one
image at a time, and quantised layers use oneDNN, which is faster there.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

CBWR_MODE = "AUTO,STRICT"
"""Intel MKL's conditional numerical reproducibility: the best code, one summing order."""
SPIN_COUNT = "1000"


def configure_cpu_math() -> None:
    """Set MKL_CBWR (row-invariant matrix products) and GOMP_SPINCOUNT (threads spin briefly).

    Call it before torch is imported: OpenMP reads its variable then, MKL before its first product.
    By default waiting threads spin for so long that two runs on one machine take many times as long
    as one; without spinning, one run takes a third longer (experiments/LOG.md). Variables that the
    user has set are left alone.
    """
    os.environ.setdefault("MKL_CBWR", CBWR_MODE)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def batch_limit(images: int, device: str) -> int:
    """How many of a batch's images may go through a pipeline together: all, or one.

    A GPU's products depend on the batch, too: there it is not split, and cache keys hold its size.
    """
    return images if device != "cpu" or row_invariant() else 1


def use_onednn(device: str) -> bool:
    """Whether float32 products on `device` should use `onednn_product`, which is faster there."""
    return device == "cpu" and not row_invariant() and _has_onednn()


def onednn_product(x: Tensor, w_OI: Tensor) -> Tensor:
    """x·Wᵀ [..., out] by oneDNN, by the operator that torch.compile emits for linear layers."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")


def use_bfloat16(device: str, dtype: str) -> bool:
    """Whether compute=auto multiplies a model of this type in bfloat16 on this device."""
    return device == "cpu" and dtype == "bfloat16" and bfloat16_units()


@functools.cache
def bfloat16_units() -> bool:
    """Whether this processor has bfloat16 instructions (AVX-512 BF16, AMX, or Arm's BF16)."""
    import torch

    tell = getattr(torch.cpu, "get_capabilities", dict)
    return any(tell().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def _has_onednn() -> bool:
    """Whether the operator exists and multiplies correctly, including empty inputs (a probe)."""
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
    """Whether float32 products on this CPU give the same bits for few rows as for many (a probe).

    threads: number of threads to probe with, by default PyTorch's present number.
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
