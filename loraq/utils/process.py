"""Thread count, GPU and its arithmetic in this process, set for a block and restored after it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from loraq.utils.gpu import fixed_arithmetic, gpu_index


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """PyTorch computes with `count` threads while the block runs."""
    import torch

    before = torch.get_num_threads()
    if count == before:  # setting it also changes how MKL chooses its own number of threads
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def own_gpu(device: str) -> Iterator[None]:
    """The current GPU is that of this process while the block runs, and computes as in every run.

    The GPU is `gpu_index`, its settings are those of `fixed_arithmetic`. No-op on a CPU.
    """
    if device != "cuda":
        yield
        return
    import torch

    if not torch.cuda.is_available():  # plans need none
        yield
        return
    before = torch.cuda.current_device()
    torch.cuda.set_device(gpu_index())
    try:
        with fixed_arithmetic():
            yield
    finally:
        torch.cuda.set_device(before)
