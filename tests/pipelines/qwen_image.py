"""Qwen-Image: Qwen2.5-VL with a template and masks, joint blocks, a video autoencoder."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

# The pipeline's own guidance_scale is for distilled models; classifier-free guidance is "true" CFG.
CALL = {**SQUARE, "true_cfg_scale": 4.0, "negative_prompt": " "}
STEPS = 2


def pipeline() -> QwenImagePipeline:
    """Width 64, two blocks."""
    tokenizer = _text.qwen_tokenizer()
    text = _text.decoder_sizes(tokenizer)
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    vision = {
        "depth": 1,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": _text.WIDTH,
    }
    transformer = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=_text.WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={**text, "rope_parameters": rope},
            vision_config=vision,
            tie_word_embeddings=True,
        )
    )
    draw_parameters(transformer)
    draw_parameters(encoder)
    torch.nn.init.constant_(transformer.txt_norm.weight, 4.0)  # so that the prompt has an effect
    return QwenImagePipeline(
        scheduler=_image.flow_scheduler(),
        vae=AutoencoderKLQwenImage(
            base_dim=8,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
