"""FLUX.2: Mistral 3 (three of its 30 layers), fused single-stream blocks, shared modulation."""

from __future__ import annotations

from diffusers import AutoencoderKLFlux2, Flux2Pipeline, Flux2Transformer2DModel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from tests.little import draw_parameters
from tests.pipelines import _image, _text
from tests.pipelines._image import SQUARE

LAYERS = 30  # the pipeline reads the outputs of layers 10, 20 and 30
CALL = {
    **SQUARE,
    "max_sequence_length": 48,
    "guidance_scale": 4.0,
}  # the system message has 30 tokens
STEPS = 2


def pipeline() -> Flux2Pipeline:
    """Width 80: groups of 64 are cut. Two blocks of each kind."""
    processor = _text.pixtral_processor()
    vision = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "head_dim": 16,
    }
    text = {"model_type": "mistral", **_text.decoder_sizes(processor.tokenizer, LAYERS)}
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=5,
        joint_attention_dim=3 * _text.WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
    )
    encoder = Mistral3ForConditionalGeneration(
        Mistral3Config(text_config=text, vision_config=vision)
    )
    draw_parameters(transformer)
    draw_parameters(encoder)
    return Flux2Pipeline(
        scheduler=_image.flow_scheduler(),
        vae=AutoencoderKLFlux2(**_image.STRIDE_8),
        text_encoder=encoder,
        tokenizer=processor,
        transformer=transformer,
    )
