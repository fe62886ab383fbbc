"""Moments of layer inputs from the model's weights alone, without data.

A modulated normalisation is x = n·(1 + scale(t)) + shift(t), with n of mean 0 and variance 1 in
every channel, so its moments at each timestep follow from the timestep embedding. They are
propagated through linear maps with channels treated as independent.

Letters: T timesteps, I and O channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loraq.models.pointwise import finite_weight
from loraq.utils.lazy_mapping import LazyMapping

TIMESTEPS = 32


@dataclass(frozen=True)
class Moment:
    """E[xᵀx] (I, I) and E[x] (I,) of one layer input over all tokens, float32."""

    second_II: Tensor
    mean_I: Tensor

    def __repr__(self) -> str:
        return f"Moment(channels={len(self.mean_I)})"


@dataclass(frozen=True)
class Moments:
    """Mean and variance of every channel at every timestep, (T, I) float32."""

    mean_TI: Tensor
    variance_TI: Tensor

    def __repr__(self) -> str:
        return f"Moments(timesteps={len(self.mean_TI)}, channels={self.mean_TI.shape[1]})"

    def to(self, device: torch.device) -> Moments:
        """The same on a device."""
        return Moments(self.mean_TI.to(device), self.variance_TI.to(device))

    def pooled(self) -> Moment:
        """E[xᵀx] and E[x], averaged over timesteps: the mean of diag(variance) + meanᵀ·mean."""
        count = len(self.mean_TI)
        second_II = self.mean_TI.T @ self.mean_TI / count
        second_II.diagonal().add_(self.variance_TI.mean(0))
        return Moment(second_II, self.mean_TI.mean(0))


def timesteps(count: int = TIMESTEPS, last: int = 999) -> Tensor:
    """Evenly spaced timesteps of the training schedule, 0 … last."""
    return torch.linspace(0, last, count)


def modulated(shift_TI: Tensor, scale_TI: Tensor) -> Moments:
    """Moments of n·(1 + scale) + shift, n normalised."""
    return Moments(shift_TI.float(), (1 + scale_TI.float()).square())


def linear(x: Moments, transformer: nn.Module, name: str) -> Moments:
    """Moments of x·Wᵀ + b, of the transformer's layer `name`, for independent channels."""
    w_OI, layer = finite_weight(transformer, name).float(), transformer.get_submodule(name)
    mean_TO = x.mean_TI @ w_OI.T
    if layer.bias is not None:
        mean_TO = mean_TO + layer.bias.detach().float()
    return Moments(mean_TO, x.variance_TI @ w_OI.square().T)


def known_block_inputs(transformer: nn.Module, embedded: Tensor) -> Mapping[str, Moment]:
    """Moments by input id for blocks with a `scale_shift_table`; embedded: timesteps (T, 6·I).

    q/k/v and the feed-forward layers read modulated normalisations. self_out reads a mean of values
    over tokens, which is treated as one value. The inputs of cross_q (the residual stream) and
    cross_out (the text) are unknown. That of ff_down depends on how channels correlate
    (experiments/LOG.md has the attempt). Each (I, I) matrix is computed when it is read.
    """
    known: dict[str, Moments] = {}
    for number, block in enumerate(transformer.transformer_blocks):
        table = block.scale_shift_table[None].float()
        shift, scale, _, ff_shift, ff_scale, _ = (
            table + embedded.float().reshape(len(embedded), 6, -1)
        ).unbind(1)
        name = f"transformer_blocks.{number}"
        attention = modulated(shift, scale)
        known[f"{name}.attn1.qkv"] = attention
        known[f"{name}.attn1.out"] = linear(attention, transformer, f"{name}.attn1.to_v")
        known[f"{name}.ff.up"] = modulated(ff_shift, ff_scale)
    return LazyMapping(list(known), lambda name: known[name].pooled())
