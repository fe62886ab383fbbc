"""Spectra, kurtosis and activation outliers, to show how far training moved the weights.

Per linear layer of the blocks: the share of the squared singular values in the first 16, the same
for a Gaussian matrix of that shape, the share of all directions that hold half of them, the
weights' kurtosis (3 for a Gaussian), max|W| / rms(W), the mean over tokens of max|x| / rms(x) of
the layer's input x, and the rms of the largest channel of x over that of all channels.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from loraq.models import list_layers
from loraq.models.denoisers import denoiser_of
from loraq.models.layers import family_of
from loraq.models.pointwise import channels_last, weight_matrix

from . import model
from .settings import CAPTIONS, RECORD, RESULT, SETTINGS, Settings

RANK = 16


def spectrum(weight: torch.Tensor) -> torch.Tensor:
    """Return the squared singular values of a matrix, largest first, as shares of their sum."""
    squares = torch.linalg.svdvals(weight.detach().double()).square()
    return squares / squares.sum()


def top_energy(weight: torch.Tensor, rank: int = RANK) -> float:
    """Return the share of the squared singular values of a matrix that its first ``rank`` hold."""
    return float(spectrum(weight)[:rank].sum())


def half_energy(shares: torch.Tensor) -> float:
    """Return which share of the directions holds half of the energy; comparable across widths."""
    return (int((shares.cumsum(0) < 0.5).sum()) + 1) / len(shares)


def kurtosis(weight: torch.Tensor) -> float:
    """Return the fourth standardised moment of all elements, 3 for a Gaussian."""
    w = weight.detach().double().flatten()
    w = w - w.mean()
    return float(w.pow(4).mean() / w.pow(2).mean().square())


class Outliers:
    """Hooks that collect the outliers of the layers' inputs, per token and per channel."""

    def __init__(self, layers: dict[str, torch.nn.Module]):
        """Hook the layers."""
        self.sums = dict.fromkeys(layers, 0.0)
        self.counts = dict.fromkeys(layers, 0)
        self.squares: dict[str, torch.Tensor | float] = dict.fromkeys(layers, 0.0)
        self.handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()
        ]

    def _hook(self, name: str):
        def hook(module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = channels_last(module, inputs[0].detach()).float().flatten(0, -2)
            ratio = x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-12)
            self.sums[name] += float(ratio.sum())
            self.counts[name] += len(ratio)
            self.squares[name] = self.squares[name] + x.double().square().sum(0)

        return hook

    def close(self) -> dict[str, tuple[float, float]]:
        """Remove the hooks and return both ratios by layer.

        Over tokens, the mean of absmax over root mean square; over channels, the largest root mean
        square over that of all. A layer that was not called has NaN.
        """
        for handle in self.handles:
            handle.remove()
        found = {}
        for name, squares in self.squares.items():
            if not isinstance(squares, torch.Tensor):
                found[name] = (math.nan, math.nan)
                continue
            channel = float((squares.max() / squares.mean()).sqrt())
            found[name] = (self.sums[name] / self.counts[name], channel)
        return found


def inspect(
    pipe: DiffusionPipeline, prompts: list[str], settings: Settings = SETTINGS
) -> list[dict]:
    """Return one row per linear or 1 x 1 convolution of the blocks."""
    net = denoiser_of(pipe)
    found = list_layers(net, family_of(net), ())
    layers = {layer.name: net.get_submodule(layer.name) for layer in found}
    roles = {layer.name: layer.role for layer in found}
    outliers = Outliers(layers)
    model.sample(pipe, prompts, list(range(len(prompts))), settings=settings)
    ratios = outliers.close()
    generator = torch.Generator().manual_seed(0)
    random_energy: dict[tuple[int, ...], float] = {}
    rows = []
    for name, layer in layers.items():
        weight = weight_matrix(layer).float()
        shape = tuple(weight.shape)
        if shape not in random_energy:
            random_energy[shape] = top_energy(torch.randn(shape, generator=generator))
        shares = spectrum(weight)
        rows.append(
            {
                "layer": name.removeprefix("transformer_blocks."),
                "role": roles[name],
                "shape": f"{shape[0]}x{shape[1]}",
                "top16": round(float(shares[:RANK].sum()), 4),
                "top16_random": round(random_energy[shape], 4),
                "half": round(half_energy(shares), 4),
                "kurtosis": round(kurtosis(weight), 2),
                "max_over_rms": round(float(weight.abs().max() / weight.square().mean().sqrt()), 2),
                "activation_outlier": round(ratios[name][0], 2),
                "channel_outlier": round(ratios[name][1], 2),
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=RESULT / SETTINGS.name)
    parser.add_argument("--csv", type=Path, default=RECORD / f"{SETTINGS.name}_weights.csv")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = json.loads(CAPTIONS.read_text(encoding="utf-8"))
    table = inspect(pipe, [e["prompt"] for e in captions["calibration"][:4]])
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    print("  ".join(f"{key:>18s}" for key in table[0]))
    for row in table:
        print("  ".join(f"{value!s:>18s}" for value in row.values()))
    keys = [k for k, v in table[0].items() if isinstance(v, float)]
    print("mean", {k: round(sum(r[k] for r in table) / len(table), 3) for k in keys})
