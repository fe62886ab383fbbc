"""Wan 2.2: a video pipeline with two transformers, one for the noisy steps and one for the rest."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKLWan,
    UniPCMultistepScheduler,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import UMT5Config, UMT5EncoderModel

from tests.little import draw_parameters, small_t5, word_tokenizer

CALL = {"height": 32, "width": 32, "num_frames": 5, "max_sequence_length": 8}
STEPS = 3


def pipeline(experts: int = 2) -> WanPipeline:
    """Width 48, two blocks an expert; the boundary is such that both experts run in three steps.

    With `experts=1`: as Wan 2.2's 5B model, one transformer with a timestep for each token.
    """
    torch.manual_seed(13)
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = small_t5(tokenizer, UMT5Config)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    return WanPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(text),
        vae=vae,
        transformer=_transformer(),
        transformer_2=_transformer() if experts == 2 else None,
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        boundary_ratio=0.9 if experts == 2 else None,
        expand_timesteps=experts == 1,
    )


def _transformer() -> WanTransformer3DModel:
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=112,
        num_layers=2,
        rope_max_seq_len=32,
    )
    draw_parameters(transformer)
    return transformer
