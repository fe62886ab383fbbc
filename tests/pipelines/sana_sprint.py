"""SANA-Sprint: two steps of a consistency model, embedded guidance, normalised queries and keys."""

from __future__ import annotations

from diffusers import SanaSprintPipeline, SanaTransformer2DModel, SCMScheduler

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

CALL = {
    **SQUARE,
    "guidance_scale": 4.5,
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": ["Describe the image:"],  # the published one has 300 tokens
}
STEPS = 2


def pipeline() -> SanaSprintPipeline:
    """Width 64, two blocks."""
    tokenizer = _text.gemma_tokenizer()
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=4,
        cross_attention_head_dim=16,
        cross_attention_dim=64,
        caption_channels=_text.WIDTH,
        sample_size=8,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    )
    draw_parameters(transformer)
    return SanaSprintPipeline(
        tokenizer=tokenizer,
        text_encoder=_text.gemma_encoder(tokenizer),
        vae=_image.autoencoder_dc(),
        transformer=transformer,
        scheduler=SCMScheduler(),
    )
