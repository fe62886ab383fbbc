"""LTX-Video: a video pipeline with packed latents and PixArt's modulation."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLLTXVideo,
    FlowMatchEulerDiscreteScheduler,
    LTXPipeline,
    LTXVideoTransformer3DModel,
)
from transformers import T5EncoderModel

from tests.little import draw_parameters, small_t5, word_tokenizer

CALL = {"height": 64, "width": 64, "num_frames": 9, "max_sequence_length": 8}
STEPS = 2


def pipeline() -> LTXPipeline:
    """Width 64, two blocks."""
    torch.manual_seed(17)
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = small_t5(tokenizer)
    transformer = LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=4,
        attention_head_dim=16,
        cross_attention_dim=64,
        num_layers=2,
        caption_channels=32,
    )
    draw_parameters(transformer)
    vae = AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
    )
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
