"""What the recipes of PixArt and SANA share: one text encoder, its mask, a second-order solver."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from transformers import PreTrainedTokenizerFast


def conditions(
    text: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return what the transformer reads of captions: hidden states [n, tokens, width], and mask."""
    return text(input_ids=ids, attention_mask=mask).last_hidden_state, mask


def components(tokenizer: PreTrainedTokenizerFast, text: torch.nn.Module) -> dict[str, Any]:
    """Return the pipeline's text components."""
    return {"tokenizer": tokenizer, "text_encoder": text}


def scheduler() -> DPMSolverMultistepScheduler:
    """Return the second-order DPM solver over flow sigmas (x_t = (1 - t) x_0 + t noise, prediction
    noise - x_0)."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents [n, c, s, s] as the pipeline takes them: unchanged."""
    return latents
