"""Capture what layers read while the 16-bit model runs: a draw of token rows, or second moments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor, nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.models import Layer
from loraq.models.pointwise import channels_last


class _Capture:
    """Context manager: a forward hook on one layer of each distinct input."""

    def __init__(self, transformer: nn.Module, layers: Sequence[Layer]) -> None:
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


class InputCapture(_Capture):
    """Keeps `rows` token rows of each distinct layer input.

    Every forward gives an equal share, drawn without replacement by a generator that depends on
    (seed, input, forward) alone, so a capture can be repeated bit for bit. Memory is bounded by
    rows × width × 2 bytes an input, however long the model runs. Rows are kept in float16.
    """

    def __init__(
        self, transformer: nn.Module, layers: Sequence[Layer], rows: int, forwards: int, seed: int
    ) -> None:
        super().__init__(transformer, layers)
        self._share = max(1, -(-rows // forwards))
        self._seed = seed
        self._kept: dict[str, list[Tensor]] = {name: [] for name in self._modules}

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        kept = self._kept[input_id]
        generator = torch.Generator().manual_seed(
            (self._seed * 1_000_003 + number * 10_007 + len(kept)) % (1 << 62)
        )
        rows = torch.randperm(x_TI.shape[0], generator=generator)[: self._share]
        kept.append(x_TI[rows.to(x_TI.device)].to("cpu", torch.float16))

    def inputs(self) -> dict[str, Tensor]:
        """input id → (rows, in) float16, in the order in which the model ran."""
        return {name: torch.cat(kept) for name, kept in self._kept.items() if kept}


@dataclass(frozen=True)
class Moment:
    """E[xᵀx] (in × in) and E[x] (in) of one layer input over every token seen, float32."""

    second_II: Tensor
    mean_I: Tensor


class MomentCapture(_Capture):
    """Second moments of each distinct layer input, over all tokens of all forwards.

    Running means (each forward weighs by its tokens), so memory is in² × 4 bytes an input however
    long the model runs.
    """

    def __init__(self, transformer: nn.Module, layers: Sequence[Layer]) -> None:
        super().__init__(transformer, layers)
        self._tokens: dict[str, int] = {}
        self._moments: dict[str, Moment] = {}

    def _read(self, number: int, input_id: str, x_TI: Tensor) -> None:
        x_TI = x_TI.float()
        tokens = x_TI.shape[0]
        second_II, mean_I = x_TI.T @ x_TI / tokens, x_TI.mean(0)
        before = self._tokens.get(input_id, 0)
        self._tokens[input_id] = before + tokens
        if not before:
            self._moments[input_id] = Moment(second_II, mean_I)
            return
        held, share = self._moments[input_id], tokens / (before + tokens)
        held.second_II.lerp_(second_II, share)
        held.mean_I.lerp_(mean_I, share)

    def moments(self) -> dict[str, Moment]:
        """input id → its moments."""
        return {name: self._moments[name] for name in self._modules if name in self._moments}


def moment_tensors(moments: dict[str, Moment]) -> dict[str, Tensor]:
    """Moments as named tensors, for a file."""
    named = {}
    for input_id, moment in moments.items():
        named[f"{input_id}.second"] = moment.second_II.contiguous()
        named[f"{input_id}.mean"] = moment.mean_I.contiguous()
    return named


def moments_from(tensors: dict[str, Tensor]) -> dict[str, Moment]:
    """Inverse of `moment_tensors`."""
    ids = [name.removesuffix(".second") for name in tensors if name.endswith(".second")]
    return {i: Moment(tensors[f"{i}.second"], tensors[f"{i}.mean"]) for i in ids}


@dataclass(frozen=True)
class Activations:
    """What a calibrated recipe may read of the 16-bit model's activations; None where it may not.

    rows: input id → (rows, in); moments: input id → `Moment`; sensitivity: unit → how much its
    error matters to the transformer's output.
    """

    rows: Mapping[str, Tensor] | None = None
    moments: Mapping[str, Moment] | None = None
    sensitivity: Mapping[str, float] | None = None

    def allowed(self, recipe: Recipe) -> Activations:
        """Only what `recipe` reads: a data-free recipe gets nothing. LoraqError where it lacks."""
        wanted = {
            "rows": (recipe.needs_rows, "transform.smooth or branch.select=output"),
            "moments": (recipe.needs_moments, "rounding=gptq or branch.weighting"),
            "sensitivity": (recipe.needs_sensitivity, "allocation.sensitivity=activations"),
        }
        kept = {}
        for name, (needed, setting) in wanted.items():
            kept[name] = getattr(self, name) if needed else None
            if needed and kept[name] is None:
                raise LoraqError(
                    f"This recipe reads activations ({setting}), and no calibration {name} were "
                    "given. Pass them, or use a data-free recipe."
                )
        return Activations(**kept)
