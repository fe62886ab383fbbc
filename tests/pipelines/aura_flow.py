"""AuraFlow: a pipeline without a family file; UMT5, joint and single blocks, register tokens."""

from __future__ import annotations

from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL
from transformers import UMT5Config, UMT5EncoderModel

from tests.little import draw_parameters, small_t5
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

CALL = {**SQUARE, "guidance_scale": 3.5}
STEPS = 2


def pipeline() -> AuraFlowPipeline:
    """Width 64, two blocks of each kind."""
    tokenizer = _text.t5_tokenizer()
    text = small_t5(tokenizer, UMT5Config)
    transformer = AuraFlowTransformer2DModel(
        sample_size=8,
        in_channels=4,
        num_mmdit_layers=2,
        num_single_dit_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=_text.WIDTH,
        caption_projection_dim=64,
        out_channels=4,
        pos_embed_max_size=16,
    )
    encoder = UMT5EncoderModel(text)
    draw_parameters(transformer)
    draw_parameters(encoder)
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder,
        vae=AutoencoderKL(**_image.STRIDE_8),
        transformer=transformer,
        scheduler=_image.flow_scheduler(dynamic=False),
    )
