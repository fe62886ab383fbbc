"""Spectra, kurtosis and activation outliers, to show how far training moved the weights.

Per linear layer of the blocks: the share of the squared singular values in the first 16, the same
for a Gaussian matrix of that shape, the weights' kurtosis (3 for a Gaussian), max|W| / rms(W), and
the mean over tokens of max|x| / rms(x) of the layer's input x.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from loraq.models import list_layers
from loraq.models.pointwise import channels_last, weight_matrix

from . import model
from .settings import ASSETS, OUTPUTS, SETTINGS

RANK = 16
FAMILIES = {"tiny_pixart": "pixart_sigma", "tiny_sana": "sana"}


def top_energy(weight: torch.Tensor, rank: int = RANK) -> float:
    """Return the share of the squared singular values of a matrix that its first ``rank`` hold."""
    squares = torch.linalg.svdvals(weight.detach().double()).square()
    return float(squares[:rank].sum() / squares.sum())


def kurtosis(weight: torch.Tensor) -> float:
    """Return the fourth standardised moment of all elements, 3 for a Gaussian."""
    w = weight.detach().double().flatten()
    w = w - w.mean()
    return float(w.pow(4).mean() / w.pow(2).mean().square())


class Outliers:
    """Hooks that collect, per layer, the mean over tokens of absmax over root mean square of the
    input."""

    def __init__(self, layers: dict[str, torch.nn.Module]):
        """Hook the layers."""
        self.sums = dict.fromkeys(layers, 0.0)
        self.counts = dict.fromkeys(layers, 0)
        self.handles = [
            layer.register_forward_pre_hook(self._hook(name)) for name, layer in layers.items()
        ]

    def _hook(self, name: str):
        def hook(module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = channels_last(module, inputs[0].detach()).float().flatten(0, -2)
            ratio = x.abs().amax(-1) / x.square().mean(-1).sqrt().clamp_min(1e-12)
            self.sums[name] += float(ratio.sum())
            self.counts[name] += len(ratio)

        return hook

    def close(self) -> dict[str, float]:
        """Remove the hooks and return the mean ratios."""
        for handle in self.handles:
            handle.remove()
        return {n: s / max(1, self.counts[n]) for n, s in self.sums.items()}


def inspect(pipe: DiffusionPipeline, prompts: list[str]) -> list[dict]:
    """Return one row per linear or 1 x 1 convolution of the blocks."""
    net, family = pipe.transformer, FAMILIES[SETTINGS.name]
    layers = {layer.name: net.get_submodule(layer.name) for layer in list_layers(net, family, ())}
    outliers = Outliers(layers)
    model.sample(pipe, prompts, list(range(len(prompts))))
    ratios = outliers.close()
    generator = torch.Generator().manual_seed(0)
    random_energy: dict[tuple[int, ...], float] = {}
    rows = []
    for name, layer in layers.items():
        weight = weight_matrix(layer).float()
        shape = tuple(weight.shape)
        if shape not in random_energy:
            random_energy[shape] = top_energy(torch.randn(shape, generator=generator))
        rows.append(
            {
                "layer": name.removeprefix("transformer_blocks."),
                "shape": f"{shape[0]}x{shape[1]}",
                "top16": round(top_energy(weight), 4),
                "top16_random": round(random_energy[shape], 4),
                "kurtosis": round(kurtosis(weight), 2),
                "max_over_rms": round(float(weight.abs().max() / weight.square().mean().sqrt()), 2),
                "activation_outlier": round(ratios[name], 2),
            }
        )
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=ASSETS / SETTINGS.name)
    parser.add_argument("--csv", type=Path, default=OUTPUTS / "weights.csv")
    arguments = parser.parse_args()
    pipe = DiffusionPipeline.from_pretrained(arguments.folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    captions = json.loads((ASSETS / "captions.json").read_text(encoding="utf-8"))
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
