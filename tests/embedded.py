"""The embedded PixArt model with captured rows of its layers' inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from loraq.compose import load_rows
from loraq.models import Layer, list_layers, load_pipeline
from loraq.quantization.calibration import InputCapture

ROWS = 512


@dataclass(frozen=True)
class Embedded:
    """The 16-bit transformer, all its layers, and rows of their inputs over all steps of a run."""

    transformer: nn.Module
    layers: list[Layer]
    inputs: dict[str, torch.Tensor]
    family: str

    def of_roles(self, *roles: str) -> list[Layer]:
        """The layers with one of the roles."""
        return [layer for layer in self.layers if layer.role in roles]


def run_embedded() -> Embedded:
    """Run the 16-bit model on two captions in four steps."""
    config, steps = load_rows(["method=reference"])[0].model, 4
    pipe = load_pipeline(config, "cpu")
    layers = list_layers(pipe.transformer, config.family, ())
    with torch.inference_mode(), InputCapture(pipe.transformer, layers, ROWS, steps, 0) as capture:
        pipe(
            prompt=["lobster, animal marine", "kimono, clothing"],
            num_inference_steps=steps,
            guidance_scale=config.guidance,
            height=128,
            width=128,
            max_sequence_length=16,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **config.call,
        )
    return Embedded(pipe.transformer, layers, capture.inputs(), config.family)
