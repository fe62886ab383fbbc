"""Thread count and GPU of this process, set for a block and restored after it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator


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
    """The current GPU is that of this process (LOCAL_RANK) while the block runs; no-op without one.

    torchrun and accelerate launch set LOCAL_RANK to the index of a process on its machine.
    """
    if device != "cuda":
        yield
        return
    import torch

    if not torch.cuda.is_available():  # plans need none
        yield
        return
    before = torch.cuda.current_device()
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    try:
        yield
    finally:
        torch.cuda.set_device(before)
