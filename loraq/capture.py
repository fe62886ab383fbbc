"""Capture the inputs that layers read while the 16-bit model runs: a random draw of token rows."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from torch import Tensor, nn

from loraq.models import Layer


class InputCapture:
    """Context manager: forward hooks that keep `rows` token rows of each distinct layer input.

    Every forward gives an equal share, drawn without replacement by a generator that depends on
    (seed, input, forward) alone, so a capture can be repeated bit for bit. Memory is bounded by
    rows × width × 2 bytes an input, however long the model runs. Rows are kept in float16.
    """

    def __init__(
        self, transformer: nn.Module, layers: Sequence[Layer], rows: int, forwards: int, seed: int
    ) -> None:
        self._modules = {layer.shares_input: layer.name for layer in reversed(layers)}
        self._transformer = transformer
        self._share = max(1, -(-rows // forwards))
        self._seed = seed
        self._kept: dict[str, list[Tensor]] = {name: [] for name in sorted(self._modules)}
        self._handles: list = []

    def __enter__(self) -> InputCapture:
        for number, (input_id, name) in enumerate(sorted(self._modules.items())):
            module = self._transformer.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._hook(number, input_id)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, number: int, input_id: str):
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x_TI = args[0].detach().reshape(-1, args[0].shape[-1])
            kept = self._kept[input_id]
            generator = torch.Generator().manual_seed(
                (self._seed * 1_000_003 + number * 10_007 + len(kept)) % (1 << 62)
            )
            rows = torch.randperm(x_TI.shape[0], generator=generator)[: self._share]
            kept.append(x_TI[rows.to(x_TI.device)].to("cpu", torch.float16))

        return keep

    def inputs(self) -> dict[str, Tensor]:
        """input id → (rows, in) float16, in the order in which the model ran."""
        return {name: torch.cat(kept) for name, kept in self._kept.items() if kept}
