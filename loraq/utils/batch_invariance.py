"""Images that do not depend, in any bit, on the batch they are generated in.

4-bit activations turn a last-bit difference into another code, and a denoising trajectory turns
that into another image: without this module, images from batch sizes 1 and 8 differ as much as the
quantised model differs from its reference (experiments/bench/batch_size.py). On Intel processors,
MKL is set to matrix products whose summation order does not depend on the number of rows. If a
probe finds that it still does (MKL ignores the setting on AMD processors), the pipeline runs one
image at a time, and quantised layers use oneDNN, which is faster on such processors.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING

from loraq.utils.process import torch_threads

if TYPE_CHECKING:
    from torch import Tensor

CBWR_MODE = "AUTO,STRICT"
"""Intel MKL's conditional numerical reproducibility: best code path, one summation order."""
SPIN_COUNT = "1000"


def configure_cpu_math() -> None:
    """Set MKL_CBWR (row-invariant matrix products) and GOMP_SPINCOUNT (threads spin briefly).

    Call it before torch is imported: OpenMP reads its variable on import, MKL before the first
    product. By default, waiting threads spin so long that two runs on one machine take many times
    as long as one; without spinning, one run takes a third longer (experiments/LOG.md). Variables
    that the user has set do not change.
    """
    os.environ.setdefault("MKL_CBWR", CBWR_MODE)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def batch_limit(images: int, device: str) -> int:
    """The number of images that a pipeline call may process together: all of a batch, or one.

    Products on a GPU depend on the batch as well, but batches are not split there; cache keys
    contain the batch size instead.
    """
    return images if device != "cpu" or row_invariant() else 1


def use_onednn(device: str) -> bool:
    """Whether float32 products on `device` should use `onednn_product` because it is faster."""
    return device == "cpu" and not row_invariant() and _has_onednn()


def onednn_product(x: Tensor, w_OI: Tensor) -> Tensor:
    """x·Wᵀ [..., out] with oneDNN, through the operator that torch.compile uses for nn.Linear."""
    import torch

    return torch.ops.mkldnn._linear_pointwise(x, w_OI, None, "none", [], "")


def use_bfloat16(device: str, dtype: str) -> bool:
    """Whether compute=auto multiplies in bfloat16, for a model of this dtype on this device."""
    return device == "cpu" and dtype == "bfloat16" and bfloat16_units()


@functools.cache
def bfloat16_units() -> bool:
    """Whether this processor has bfloat16 instructions (AVX-512 BF16, AMX, or Arm's BF16)."""
    import torch

    if not hasattr(torch.cpu, "get_capabilities"):
        return False
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


@functools.cache
def _has_onednn() -> bool:
    """Whether the operator exists and is correct, also for empty inputs (tested by a probe)."""
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
    """Whether a row of a float32 product on this CPU is independent of the other rows (a probe).

    threads: number of threads for the probe; default `torch.get_num_threads()`.
    """
    import torch

    return _row_invariant(torch.get_num_threads() if threads is None else threads)


@functools.cache
def _row_invariant(threads: int) -> bool:
    with torch_threads(threads):
        return _products_are_row_invariant()


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
