"""PixArt-α: T5 and the conditions of size and aspect ratio that PixArt-Σ has not."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
)

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

CALL = {
    **SQUARE,
    "guidance_scale": 4.5,
    "use_resolution_binning": False,
    "clean_caption": False,
}
STEPS = 2


def pipeline() -> PixArtAlphaPipeline:
    """Width 96, of which the three size embeddings have a third each: groups of 64 are cut."""
    tokenizer = _text.t5_tokenizer()
    transformer = PixArtTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=96,
        sample_size=128,  # the pipeline passes size and aspect ratio to models of this size
        caption_channels=_text.WIDTH,
        use_additional_conditions=True,
    )
    draw_parameters(transformer)
    return PixArtAlphaPipeline(
        tokenizer=tokenizer,
        text_encoder=_text.t5_encoder(tokenizer),
        vae=AutoencoderKL(**_image.STRIDE_8),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
