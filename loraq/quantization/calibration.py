"""Capture what layers read while the 16-bit model runs: a draw of token rows, or second moments.

At full size either is gigabytes. With a `scratch` folder they are gathered in mapped files, whose
pages are the disk's and not the process's.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.formats.quantization import all_finite
from loraq.models.layers import Layer
from loraq.models.moments import Moment
from loraq.models.pointwise import channels_last


class _Capture:
    """Context manager: a forward hook on one layer of each distinct input."""

    def __init__(
        self, transformer: nn.Module, layers: Sequence[Layer], scratch: Path | None = None
    ) -> None:
        self._scratch = scratch
        names = {layer.shares_input: layer.name for layer in reversed(layers)}
        self._modules = {
            input_id: transformer.get_submodule(name) for input_id, name in sorted(names.items())
        }
        self._handles: list = []

    def __enter__(self) -> Self:
        for number, (input_id, module) in enumerate(self._modules.items()):
            module_hook = self._hook(number, input_id)
            self._handles.append(module.register_forward_pre_hook(module_hook))
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
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            self._read(number, input_id, channels_last(module, args[0].detach()).flatten(0, -2))

        return keep

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        raise NotImplementedError

    def _room(self, number: int, *shape: int, dtype: torch.dtype) -> Tensor:
        """A CPU tensor to fill: in memory, or in a mapped file of the scratch folder."""
        if self._scratch is None:
            return torch.empty(*shape, dtype=dtype)
        self._scratch.mkdir(parents=True, exist_ok=True)
        count = torch.Size(shape).numel()
        path = self._scratch / f"{number:05d}-{count}"
        with path.open("xb") as file:  # a full disk is an error here, not a signal at a later write
            os.posix_fallocate(file.fileno(), 0, count * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(*shape)


class InputCapture(_Capture):
    """Keeps `rows` token rows of each distinct layer input.

    Every forward gives an equal share, drawn without replacement by a generator that depends on
    (seed, input, forward) alone, so a capture can be repeated bit for bit. Memory is bounded by
    rows × width × 2 bytes an input, however long the model runs. Rows are kept in float16.
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
        self._share = max(1, -(-rows // forwards))
        self._forwards, self._seed = forwards, seed
        self._kept: dict[str, Tensor] = {}
        self._drawn: dict[str, list[int]] = {name: [] for name in self._modules}

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        drawn = self._drawn[input_id]
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + number * 10_007 + len(drawn)) % (1 << 62)
        )
        rows = torch.randperm(x_TI.shape[0], generator=generator)[: self._share]
        if len(drawn) % self._forwards == 0:  # more forwards than announced: as much room again
            most, width = self._share * (len(drawn) + self._forwards), x_TI.shape[1]
            room = self._room(number, most, width, dtype=torch.float16)
            if drawn:
                room[: sum(drawn)] = self._kept[input_id][: sum(drawn)]
            self._kept[input_id] = room
        start = sum(drawn)
        self._kept[input_id][start : start + len(rows)] = x_TI[rows.to(x_TI.device)]
        drawn.append(len(rows))

    def inputs(self) -> dict[str, Tensor]:
        """input id → (rows, in) float16, in the order in which the model ran.

        LoraqError where a value is NaN, Inf or beyond float16.
        """
        found = {name: kept[: sum(self._drawn[name])] for name, kept in self._kept.items()}
        for name, rows_TI in found.items():
            if not all_finite(rows_TI):
                raise LoraqError(
                    f"The rows captured of input '{name}' have values that are NaN or beyond "
                    f"float16's {torch.finfo(torch.float16).max:g}, in which they are kept. Take a "
                    "recipe that reads second moments or weights alone (method=gptq, loraq_best), "
                    "or mend the model that gives them."
                )
        return found


class MomentCapture(_Capture):
    """Second moments of each distinct layer input, over all tokens of all forwards.

    Running means (each forward weighs by its tokens), so memory is in² × 4 bytes an input however
    long the model runs; they stay on a GPU if the model is there.
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
                room = self._room(number, *second_II.shape, dtype=torch.float32)
                second_II = room.copy_(second_II)
            self._moments[input_id] = Moment(second_II, mean_I)
            return
        held, share = self._moments[input_id], tokens / (before + tokens)
        held.second_II.lerp_(second_II, share)
        held.mean_I.lerp_(mean_I, share)

    def moments(self) -> dict[str, Moment]:
        """input id → its moments."""
        return {name: self._moments[name] for name in self._modules if name in self._moments}


def moment_tensors(moments: Mapping[str, Moment]) -> Iterator[dict[str, Tensor]]:
    """Moments as named tensors, those of one input at a time, for files."""
    for input_id, moment in moments.items():
        second_II = moment.second_II.contiguous()
        yield {f"{input_id}.second": second_II, f"{input_id}.mean": moment.mean_I.contiguous()}


def moments_from(tensors: Mapping[str, Tensor]) -> dict[str, Moment]:
    """Inverse of `moment_tensors`."""
    ids = [name.removesuffix(".second") for name in tensors if name.endswith(".second")]
    return {i: Moment(tensors[f"{i}.second"], tensors[f"{i}.mean"]) for i in ids}
