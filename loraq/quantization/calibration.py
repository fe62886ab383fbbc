"""Capture layer inputs while the 16-bit model runs: sampled token rows, or second moments.

Both take gigabytes at full size. With a `scratch` folder they are collected in memory-mapped files,
whose pages do not count as the process's anonymous memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from loraq.models.denoisers import parts
from loraq.models.layers import Layer
from loraq.models.moments import Moment
from loraq.models.pointwise import channels_last

WAITING_BYTES = 64 << 20
"""Of rows on the device that wait for the end of the forward to be copied to the host."""


class _Capture:
    """Context manager: a forward pre-hook on one layer of each distinct input."""

    def __init__(
        self, transformer: nn.Module, layers: Sequence[Layer], scratch: Path | None = None
    ) -> None:
        self._scratch, self._transformer = scratch, transformer
        names = {layer.shares_input: layer.name for layer in reversed(layers)}
        self._modules = {
            input_id: transformer.get_submodule(name) for input_id, name in sorted(names.items())
        }
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for number, (input_id, module) in enumerate(self._modules.items()):
            module_hook = self._hook(number, input_id)
            self._handles.append(module.register_forward_pre_hook(module_hook))
        for network in parts(self._transformer).values():
            self._handles.append(network.register_forward_hook(lambda *_: self._finish()))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._modules)} inputs)"

    def _hook(self, number: int, input_id: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._read(number, input_id, channels_last(module, args[0].detach()).flatten(0, -2))

        return keep

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        """Called after every forward of the transformer."""

    def _allocate(self, number: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised CPU tensor, in memory or in a mapped file of the scratch folder."""
        if self._scratch is None:
            return torch.empty(*shape, dtype=dtype)
        self._scratch.mkdir(parents=True, exist_ok=True)
        count = torch.Size(shape).numel()
        path = self._scratch / f"{number:05d}-{count}-{dtype}"
        with path.open("xb") as file:  # a full disk raises here, not SIGBUS at a later write
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


class InputCapture(_Capture):
    """Sample `rows` token rows of each distinct layer input, in float16 where it holds them.

    Every forward contributes an equal number, drawn without replacement by a generator seeded by
    (seed, input, forward), so a capture is bitwise reproducible. forwards: the expected number of
    forward passes; more are allowed and add rows. Memory: rows × width × 2 bytes per input; an
    input whose values leave float16's range is kept in the model's dtype.
    """

    def __init__(
        self,
        transformer: nn.Module,
        layers: Sequence[Layer],
        rows: int,
        forwards: int,
        seed: int,
        scratch: Path | None = None,
    ) -> None:
        super().__init__(transformer, layers, scratch)
        forwards = max(1, forwards // len(parts(transformer)))  # of each expert
        self._rows_per_forward = max(1, -(-rows // forwards))
        self._forwards, self._seed = forwards, seed
        self._kept: dict[str, Tensor] = {}
        self._drawn: dict[str, list[int]] = {name: [] for name in self._modules}
        self._waiting: list[tuple[int, str, int, Tensor]] = []

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        drawn = self._drawn[input_id]
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + number * 10_007 + len(drawn)) % (1 << 62)
        )
        rows = torch.randperm(x_TI.shape[0], generator=generator)[: self._rows_per_forward]
        self._waiting.append((number, input_id, len(drawn), x_TI[rows.to(x_TI.device)]))
        drawn.append(len(rows))
        if sum(x_TI.nbytes for *_, x_TI in self._waiting) > WAITING_BYTES:
            self._finish()

    def _finish(self) -> None:
        """Bring the rows that were drawn to the host, which waits once for those of a type."""
        waiting, self._waiting = self._waiting, []
        alike: dict[object, list[Tensor]] = {}
        for *_, x_TI in waiting:
            alike.setdefault((x_TI.device, x_TI.dtype), []).append(x_TI)
        copied = {kind: iter(_to_host(held)) for kind, held in alike.items()}
        for number, input_id, forward, x_TI in waiting:
            self._keep(number, input_id, forward, next(copied[x_TI.device, x_TI.dtype]))

    def _keep(self, number: int, input_id: str, forward: int, x_TI: Tensor) -> None:
        kept, start = self._kept.get(input_id), sum(self._drawn[input_id][:forward])
        dtype = torch.float16 if kept is None else kept.dtype
        if dtype == torch.float16 and not _fits_float16(x_TI):
            dtype = x_TI.dtype
        full = forward % self._forwards == 0  # at first, and after more forwards than expected
        if kept is None or full or dtype != kept.dtype:
            periods = forward // self._forwards + 1
            capacity = self._rows_per_forward * self._forwards * periods
            buffer = self._allocate(number, capacity, x_TI.shape[1], dtype=dtype)
            if kept is not None:
                buffer[:start] = kept[:start]
            self._kept[input_id] = kept = buffer
        kept[start : start + len(x_TI)] = x_TI

    def inputs(self) -> dict[str, Tensor]:
        """input id → (rows, in), in the order of the forward passes; NaN and Inf as they are."""
        self._finish()
        return {name: kept[: sum(self._drawn[name])] for name, kept in self._kept.items()}


def _to_host(parts: list[Tensor]) -> list[Tensor]:
    """Tensors of one device and type on the CPU, by one copy."""
    if parts[0].device.type == "cpu":
        return parts
    copied = torch.cat([part.flatten() for part in parts]).cpu()
    flat = copied.split([part.numel() for part in parts])
    return [one.view(part.shape) for one, part in zip(flat, parts, strict=True)]


def _fits_float16(x: Tensor) -> bool:
    """Whether the largest finite magnitude of x is 0 or in float16's normal range."""
    largest = x.nan_to_num(0.0, 0.0, 0.0).abs().amax().item() if x.numel() else 0.0
    limits = torch.finfo(torch.float16)
    return largest == 0 or limits.smallest_normal <= largest <= limits.max


class MomentCapture(_Capture):
    """Second moments E[xᵀx] and means of each distinct layer input over all tokens of all forwards.

    Running means, weighted by tokens, so memory is in² × 4 bytes per input for any number of
    forwards. They are kept on the model's device.
    """

    def __init__(
        self, transformer: nn.Module, layers: Sequence[Layer], scratch: Path | None = None
    ) -> None:
        super().__init__(transformer, layers, scratch)
        self._tokens: dict[str, int] = {}
        self._moments: dict[str, Moment] = {}

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        tokens = x_TI.shape[0]
        second_II, mean_I = x_TI.T @ x_TI / tokens, x_TI.mean(0)
        before = self._tokens.get(input_id, 0)
        self._tokens[input_id] = before + tokens
        if not before:
            if self._scratch is not None and second_II.device.type == "cpu":
                buffer = self._allocate(number, *second_II.shape, dtype=torch.float32)
                second_II = buffer.copy_(second_II)
            self._moments[input_id] = Moment(second_II, mean_I)
            return
        held, fraction = self._moments[input_id], tokens / (before + tokens)
        held.second_II.lerp_(second_II, fraction)
        held.mean_I.lerp_(mean_I, fraction)

    def moments(self) -> dict[str, Moment]:
        """input id → moments, sorted by input id."""
        return {name: self._moments[name] for name in self._modules if name in self._moments}


def moment_tensors(moments: Mapping[str, Moment]) -> Iterator[dict[str, Tensor]]:
    """Moments as named tensors for a file, one dictionary per input."""
    for input_id, moment in moments.items():
        second_II = moment.second_II.contiguous()
        yield {f"{input_id}.second": second_II, f"{input_id}.mean": moment.mean_I.contiguous()}


def moments_from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Moment]:
    """Inverse of `moment_tensors`."""
    ids = [name.removesuffix(".second") for name in tensors if name.endswith(".second")]
    return {i: Moment(tensors[f"{i}.second"], tensors[f"{i}.mean"]) for i in ids}
