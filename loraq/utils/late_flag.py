"""Read a loop's stop flag from a GPU without keeping the GPU waiting for the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class LateFlag:
    """On a GPU, `read` returns the flag of the round before, while this round is still computed.

    So the GPU always has a round of work, and the loop runs for one round more than it needs.
    Elsewhere, `read` returns the flag itself.
    """

    def __init__(self) -> None:
        self._pending: tuple[Tensor, Any] | None = None

    def __repr__(self) -> str:
        return f"LateFlag(pending={self._pending is not None})"

    def read(self, flag: Tensor) -> bool:
        """Whether to stop after this round; flag: a boolean on the device."""
        import torch

        if flag.device.type != "cuda":
            return bool(flag)
        late, copied = self._pending, torch.cuda.Event()
        self._pending = flag.to("cpu", non_blocking=True), copied
        copied.record(torch.cuda.current_stream(flag.device))  # not that of the current GPU
        if late is None:
            return False
        late[1].synchronize()
        return bool(late[0])
