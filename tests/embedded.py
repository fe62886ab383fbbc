"""The embedded PixArt with rows of its layers' inputs; parts of the little random models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from loraq.capture import InputCapture
from loraq.compose import load_rows
from loraq.models import Layer, list_layers, load_pipeline

ROWS = 512
WORDS = ("red", "green", "blue", "cat", "dog", "fish", "a", "one")


@dataclass(frozen=True)
class Embedded:
    """The 16-bit transformer, all its layers, and rows of their inputs at every step of a run."""

    transformer: nn.Module
    layers: list[Layer]
    inputs: dict[str, torch.Tensor]
    family: str

    def of_roles(self, *roles: str) -> list[Layer]:
        return [layer for layer in self.layers if layer.role in roles]


def run_embedded() -> Embedded:
    """Two captions, four steps."""
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


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of few words; `special` as `PreTrainedTokenizerFast` names them, ids in order."""
    words = [*special.values(), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@torch.no_grad()
def draw_parameters(module: nn.Module) -> None:
    """Every parameter anew: fresh gates and projections are zero, and ignore their layers."""
    for parameter in module.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.copy_(torch.randn_like(parameter) * fan**-0.5)
