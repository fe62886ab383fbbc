"""What a pipeline's components are, by their names; without importing a network."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from loraq.errors import LoraqError

_DENOISER = re.compile(r"(.+_)?transformer(_.+)?")
_TEXT = re.compile(r"text_encoder|tokenizer|image_encoder|prompt_enhancer")
_DECODER = re.compile(r"(.+_)?vae(_.+)?|vqvae|vocoder")


def denoiser_names(components: Iterable[str]) -> tuple[str, ...]:
    """The names among a pipeline's components that are denoisers, `transformer` first."""
    return tuple(sorted(filter(_DENOISER.fullmatch, components), key=lambda n: (len(n), n)))


def is_text(component: str) -> bool:
    """Whether a component reads prompts or the pictures given with them."""
    return _TEXT.match(component) is not None


def is_decoder(component: str) -> bool:
    """Whether a component makes pixels or sound of latents."""
    return _DECODER.fullmatch(component) is not None


def require_denoiser(pipeline: Any) -> None:
    """LoraqError for a pipeline's class without a transformer, such as one with a UNet."""
    parameters = inspect.signature(pipeline.__init__).parameters
    if not denoiser_names(parameters):
        kind = "a UNet" if any("unet" in name for name in parameters) else "other networks"
        raise LoraqError(
            f"A {pipeline.__name__} denoises with {kind}. LoRaQ quantises the linear layers of "
            "diffusion transformers: use a model whose pipeline has a transformer."
        )
