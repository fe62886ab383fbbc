"""SD3.5: two CLIP encoders and T5, joint blocks of three kinds (dual, plain, last)."""

from __future__ import annotations

from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

CALL = {**SQUARE, "guidance_scale": 4.5}
STEPS = 2


def pipeline() -> StableDiffusion3Pipeline:
    """Width 64, three blocks: one with a second attention, one without, one without text output."""
    clip, t5 = _text.clip_tokenizer(), _text.t5_tokenizer()
    half = _text.WIDTH // 2
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=_text.WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=_text.WIDTH,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    draw_parameters(transformer)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=_image.flow_scheduler(dynamic=False),
        vae=_image.shifted_autoencoder(),
        text_encoder=_text.clip_encoder(clip, half, projection=True),
        tokenizer=clip,
        text_encoder_2=_text.clip_encoder(clip, half, projection=True),
        tokenizer_2=clip,
        text_encoder_3=_text.t5_encoder(t5),
        tokenizer_3=t5,
    )
