"""Z-Image: Qwen3 with a chat template, lists of texts and latents, refiners of both streams."""

from __future__ import annotations

from diffusers import ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

CALL = {**SQUARE, "max_sequence_length": 32, "guidance_scale": 3.0}
STEPS = 2


def pipeline() -> ZImagePipeline:
    """Width 64, two blocks of each kind."""
    tokenizer = _text.qwen_tokenizer()
    transformer = ZImageTransformer2DModel(
        in_channels=4,
        dim=64,
        n_layers=2,
        n_refiner_layers=2,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=_text.WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    )
    encoder = Qwen3Model(Qwen3Config(**_text.decoder_sizes(tokenizer)))
    draw_parameters(transformer)
    draw_parameters(encoder)
    return ZImagePipeline(
        scheduler=_image.flow_scheduler(dynamic=False),
        vae=_image.shifted_autoencoder(),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )
