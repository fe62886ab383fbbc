"""Data parallelism over single-threaded processes on one machine.

With one thread per process, operators have no internal barrier: on a shared machine a two-thread
operator waits for its preempted thread hundreds of times per step. Here the processes synchronise
once per step, over gradients in shared memory. On a GPU there is one worker and no exchange.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
import torch.multiprocessing as multiprocessing


class Exchange:
    """Averages gradients over the workers and broadcasts worker 0's clock.

    Two alternating buffers make one barrier per step sufficient.
    """

    def __init__(self, rank: int, world: int, capacity: int, shared: tuple | None):
        """``shared``: (gradients [2, world, capacity], clock [2], barrier), or ``None``."""
        self.rank, self.world, self.capacity = rank, world, capacity
        self.shared, self.turn = shared, 0

    def slice(self, batch: torch.Tensor) -> torch.Tensor:
        """Return this worker's rows of a batch."""
        return batch[self.rank :: self.world]

    def average(self, parameters: Iterable[torch.nn.Parameter], clock: float) -> float:
        """Replace every gradient by its mean over the workers and return worker 0's clock."""
        if self.shared is None:
            return clock
        gradients, clocks, barrier = self.shared
        self.turn = 1 - self.turn
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        mine = gradients[self.turn]
        mine[self.rank, : flat.numel()] = flat
        if self.rank == 0:
            clocks[self.turn] = clock
        barrier.wait()
        # The same order of summation everywhere keeps the workers' weights bit-identical.
        total = mine[0, : flat.numel()].clone()
        for other in range(1, self.world):
            total += mine[other, : flat.numel()]
        total /= self.world
        offset = 0
        for grad in grads:
            grad.copy_(total[offset : offset + grad.numel()].view_as(grad))
            offset += grad.numel()
        return float(clocks[self.turn])


def _enter(
    rank: int, function: Callable, world: int, capacity: int, shared: tuple, arguments: tuple
):
    """Run a worker."""
    torch.set_num_threads(1)
    function(Exchange(rank, world, capacity, shared), *arguments)


def launch(function: Callable, capacity: int, arguments: tuple) -> None:
    """Run ``function(exchange, *arguments)`` in one process per core; on a GPU, in this process."""
    world = (
        1
        if torch.cuda.is_available()
        else int(os.environ.get("LORAQ_WORKERS", os.cpu_count() or 1))
    )
    if world == 1:
        function(Exchange(0, 1, capacity, None), *arguments)
        return
    context = multiprocessing.get_context("spawn")
    gradients = torch.zeros(2, world, capacity).share_memory_()
    clocks = torch.zeros(2, dtype=torch.float64).share_memory_()
    shared = (gradients, clocks, context.Barrier(world))
    multiprocessing.spawn(_enter, (function, world, capacity, shared, arguments), nprocs=world)
