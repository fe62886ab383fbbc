"""FLUX.1 (dev): CLIP and T5, joint and single-stream blocks, embedded guidance, packed latents."""

from __future__ import annotations

from diffusers import FluxPipeline, FluxTransformer2DModel

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

CALL = {**SQUARE, "guidance_scale": 3.5}
STEPS = 2


def pipeline() -> FluxPipeline:
    """Width 64, two blocks of each kind."""
    clip, t5 = _text.clip_tokenizer(), _text.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=_text.WIDTH,
        pooled_projection_dim=_text.WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    draw_parameters(transformer)
    return FluxPipeline(
        scheduler=_image.flow_scheduler(),
        vae=_image.shifted_autoencoder(),
        text_encoder=_text.clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=_text.t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )
