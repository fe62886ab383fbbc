"""Stable Audio: an audio pipeline without heights, widths or modulation."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderOobleck,
    EDMDPMSolverMultistepScheduler,
    StableAudioDiTModel,
    StableAudioPipeline,
    StableAudioProjectionModel,
)
from transformers import T5EncoderModel

from tests.little import draw_parameters, small_t5, word_tokenizer

CALL = {"audio_end_in_s": 0.3}
STEPS = 2


def pipeline() -> StableAudioPipeline:
    """Width 64, two blocks; 0.32 seconds in stereo at 8 kHz."""
    torch.manual_seed(19)
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    tokenizer.model_max_length = 8
    text = small_t5(tokenizer)
    transformer = StableAudioDiTModel(
        sample_size=40,
        in_channels=8,
        out_channels=8,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        cross_attention_input_dim=32,
        global_states_input_dim=64,
        time_proj_dim=32,
    )
    draw_parameters(transformer)
    vae = AutoencoderOobleck(
        encoder_hidden_size=8,
        downsampling_ratios=[2, 4, 8],
        channel_multiples=[1, 1, 1],
        decoder_channels=8,
        decoder_input_channels=8,
        sampling_rate=8000,
    )
    return StableAudioPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        projection_model=StableAudioProjectionModel(
            text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=512
        ),
        vae=vae,
        transformer=transformer,
        scheduler=EDMDPMSolverMultistepScheduler(sigma_min=0.3, sigma_max=50.0),
    )
