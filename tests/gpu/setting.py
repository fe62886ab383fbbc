"""Models and shapes of the check: those of a GPU, or tiny ones that take every path on a CPU."""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from experiments.bench.forward import FAMILIES, TEXT_TOKENS
from experiments.bench.hub_layout import VAES
from experiments.bench.make_fullsize import CONFIGS, build_transformer
from loraq.compose import load_rows
from loraq.config import ModelConfig
from loraq.layers.kernel_costs import architecture
from loraq.models.example_inputs import example_inputs
from loraq.models.layers import Layer, list_layers
from loraq.models.networks import quiet_diffusers

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One thing to check or to measure: its name, and a function that returns a row."""

    name: str
    run: Callable[[], Row]


@dataclass(frozen=True)
class Setting:
    """What the parts run: on a GPU at full size, or, if `dry`, on a CPU with tiny models.

    simulated: tiny models on the simulated CUDA device (`tests/simulated`), which has no kernels.
    """

    dry: bool
    simulated: bool = False

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.dry and not self.simulated else "cuda")

    @property
    def target(self) -> str:
        """The instruction set of the GPU, such as sm90."""
        return "cpu" if self.device.type == "cpu" else architecture(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """Triton's interpreter rounds bfloat16 differently."""
        return torch.float32 if self.dry else torch.bfloat16

    @property
    def batches(self) -> tuple[int, ...]:
        return (1, 2) if self.dry else (16, 4, 1)

    @property
    def repeats(self) -> int:
        return 1 if self.dry else 5

    @property
    def models(self) -> tuple[str, ...]:
        return tuple(CONFIGS)

    def blocks(self, name: str) -> int:
        """The model's number of blocks."""
        return 2 if self.dry else int(CONFIGS[name]["num_layers"])

    def transformer(self, name: str, blocks: int | None = None) -> nn.Module:
        """The transformer with random weights on the device; `blocks` of them."""
        if self.dry:
            transformer: nn.Module = copy.deepcopy(little(name).transformer)
        else:
            with torch.device(self.device):
                transformer = build_transformer(name, blocks)
            draw_parameters(transformer)
        # diffusers' own `to` warns
        return nn.Module.to(transformer, self.device, self.dtype).eval().requires_grad_(False)

    def layers(self, name: str, transformer: nn.Module) -> list[Layer]:
        """The layers to quantise; in a dry run one: the interpreter is slow."""
        found = list_layers(transformer, FAMILIES[name])
        return found[-1:] if self.dry else found

    def pipeline(self, name: str, transformer: nn.Module) -> Any:
        """The model's pipeline without text encoder; its decoder has random weights."""
        diffusers = quiet_diffusers()
        if self.dry:
            vae = copy.deepcopy(little(name).vae)
        else:
            kind = {"pixart_sigma": "AutoencoderKL", "sana_1_6b": "AutoencoderDC"}[name]
            with torch.device(self.device):
                vae = getattr(diffusers, kind)(**VAES[name])
        kind = {"pixart_sigma": "PixArtSigmaPipeline", "sana_1_6b": "SanaPipeline"}[name]
        flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
        options: dict[str, Any] = {} if name == "pixart_sigma" else flow
        pipe = getattr(diffusers, kind)(
            tokenizer=None,
            text_encoder=None,
            vae=nn.Module.to(vae, self.device, self.dtype).eval(),
            transformer=transformer,
            scheduler=diffusers.DPMSolverMultistepScheduler(**options),
        )
        pipe.set_progress_bar_config(disable=True)
        pipe.vae.enable_slicing()
        return pipe

    def config(self, name: str, steps: int | None = None) -> ModelConfig:
        """The model's settings at 1024 px, tiny in a dry run; `steps` instead of 20."""
        model = load_rows([f"model={name}", "method=rtn"])[-1].model
        given: dict[str, Any] = {} if steps is None else {"steps": steps}
        if self.dry:
            given |= {"height": 64, "width": 64, "steps": 1, "max_sequence_length": 8}
        return dataclasses.replace(model, **given)

    def inputs(self, transformer: Any, images: int) -> Row:
        """Random inputs of one forward of `images` images with guidance."""
        side, tokens = transformer.config.sample_size, 8 if self.dry else TEXT_TOKENS
        found = example_inputs(transformer, 2 * images, side, tokens)
        return found | {
            part: torch.randn_like(found[part])
            for part in ("hidden_states", "encoder_hidden_states")
        }

    def embeddings(self, transformer: Any, model: ModelConfig, images: int) -> Row:
        """Random embeddings of `images` prompts, as `image_batch` takes them."""
        tokens, width = model.max_sequence_length, transformer.config.caption_channels
        like: Row = {"device": self.device, "dtype": self.dtype}
        seen = torch.ones(images, tokens, dtype=torch.int64, device=self.device)
        found: Row = {}
        for kind in ("", "negative_"):
            found[f"{kind}prompt_embeds"] = torch.randn(images, tokens, width, **like)
            found[f"{kind}prompt_attention_mask"] = seen
        return found


@functools.cache
def little(name: str) -> Any:
    """The tiny pipeline that stands for a model in a dry run."""
    from tests.little import little_pixart, little_sana

    return {"pixart_sigma": little_pixart, "sana_1_6b": little_sana}[name]()


@torch.no_grad()
def draw_parameters(module: nn.Module, seed: int = 0) -> None:
    """Draw all parameters at random on their device: some are initialised with zeros."""
    generator: torch.Generator | None = None
    for parameter in module.parameters():
        if generator is None:
            generator = torch.Generator(parameter.device).manual_seed(seed)
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.normal_(0, 0.5 * fan**-0.5, generator=generator)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    """Give a GPU's free memory back, so that the next item's peak is its own."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
