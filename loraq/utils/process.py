"""This process among others; its thread count, and its GPU's arithmetic, set for a block."""

from __future__ import annotations

import contextlib
import os
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


def first_process() -> bool:
    """Whether this process publishes: alone, or rank 0 of torchrun or accelerate launch."""
    return os.environ.get("RANK", "0") == "0"


def several_machines() -> bool:
    """Whether processes on other machines take part in this run, as its launcher tells.

    A launcher that does not tell how many of its processes are here counts as one for each machine.
    """
    for all_, here in (
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"),  # torchrun, accelerate launch
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
        ("SLURM_STEP_NUM_NODES", ""),
        ("SLURM_ARRAY_TASK_COUNT", ""),
    ):
        if _count(all_) > _count(here):
            return True
    return False


def _count(variable: str) -> int:
    given = os.environ.get(variable, "")
    return int(given) if given.isdecimal() else 1


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
