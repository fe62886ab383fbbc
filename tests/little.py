"""Small random pipelines with all components of the real ones, which run in a second."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderDC,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2Model,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

from experiments.bench.placeholders import autoencoder_kl
from loraq.config import ModelConfig

WORDS = ("red", "green", "blue", "cat", "dog", "fish", "a", "one")


def little_config(**settings: Any) -> ModelConfig:
    """The model configuration of `little_pixart` with two steps; `settings` override it."""
    call = {"use_resolution_binning": False, "clean_caption": False}
    own = {"height": 64, "width": 64, "steps": 2, "guidance": 4.5, "max_sequence_length": 8}
    plain = {"name": "little", "family": "pixart_sigma", "call": call, **own}
    return ModelConfig(**{**plain, **settings})


def little_pixart() -> PixArtSigmaPipeline:
    """A PixArt-Sigma pipeline: width 64, two blocks, 64 px."""
    torch.manual_seed(7)
    tokenizer = word_tokenizer(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    text = small_t5(tokenizer)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=8,
        patch_size=2,
        caption_channels=32,
        use_additional_conditions=False,
        attention_bias=True,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    )
    draw_parameters(transformer)
    vae = autoencoder_kl()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=T5EncoderModel(text),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )


def small_t5(tokenizer: Any, kind: Any = T5Config) -> Any:
    """The configuration of a T5 or UMT5 encoder of one layer, width 32."""
    return kind(vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)


def little_sana() -> SanaPipeline:
    """A Sana pipeline: width 40, two blocks, 64 px. 40 is no multiple of 16 or 64: short groups."""
    torch.manual_seed(11)
    tokenizer = word_tokenizer(
        pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    text = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=5,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=5,
        cross_attention_head_dim=8,
        cross_attention_dim=40,
        caption_channels=32,
        mlp_ratio=2.5,
        sample_size=8,
        patch_size=1,
    )
    draw_parameters(transformer)
    vae = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), ()),
        decoder_qkv_multiscales=((), (), (), ()),
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(text),
        vae=vae,
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )


def word_tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """A tokenizer of WORDS; `special` tokens are named as in `PreTrainedTokenizerFast`."""
    words = [*special.values(), *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@torch.no_grad()
def draw_parameters(module: nn.Module) -> None:
    """Draw all parameters at random: gates and output projections are initialised with zeros."""
    for parameter in module.parameters():
        fan = parameter[0].numel() if parameter.dim() > 1 else 16
        parameter.copy_(torch.randn_like(parameter) * fan**-0.5)
