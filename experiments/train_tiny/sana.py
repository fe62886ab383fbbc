"""SANA's networks: Gemma-2 encoder, `AutoencoderDC`, `SanaTransformer2DModel`, its pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderDC, SanaPipeline, SanaTransformer2DModel
from transformers import Gemma2Config, Gemma2Model

from .common import components as components
from .common import conditions as conditions
from .common import pack as pack
from .common import scheduler as scheduler
from .initial import start_block, start_ends, start_small
from .settings import Settings

PIPELINE = SanaPipeline
CENTRED = False  # see `normalised`
CALL: dict[str, Any] = {
    "use_resolution_binning": False,
    "clean_caption": False,
    "complex_human_instruction": None,
}
LINEAR_HEAD = 32  # SANA's linear attention has heads of 32 channels at every size


def arguments(guidance: float, count: int) -> dict[str, Any]:
    """Return the call's arguments for a number of prompts."""
    return {"guidance_scale": guidance, **CALL}


def encoder(settings: Settings) -> Gemma2Model:
    """Return an untrained two-layer Gemma-2 of width ``text_width``."""
    torch.manual_seed(settings.seed + 1)
    config = Gemma2Config(
        vocab_size=settings.vocab_size,
        hidden_size=settings.text_width,
        intermediate_size=2 * settings.text_width,
        num_hidden_layers=2,
        num_attention_heads=settings.text_width // 64,
        num_key_value_heads=settings.text_width // 64,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=max(64, settings.text_length),
        sliding_window=max(64, settings.text_length),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=1,
        use_cache=False,
    )
    return Gemma2Model(config)


def autoencoder(settings: Settings) -> AutoencoderDC:
    """Return an untrained autoencoder of stride 16, with SANA's resampling.

    It has no shortcuts around the latent's convolutions, so that its scale can be folded into them.
    """
    torch.manual_seed(settings.seed)
    channels, none = settings.vae_channels, ((),) * len(settings.vae_channels)
    return AutoencoderDC(
        latent_channels=settings.latent_channels,
        attention_head_dim=16,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        encoder_layers_per_block=(1,) * len(channels),
        decoder_layers_per_block=(1,) * len(channels),
        encoder_qkv_multiscales=none,
        decoder_qkv_multiscales=none,
        downsample_block_type="Conv",
        upsample_block_type="interpolate",
        encoder_out_shortcut=False,
        decoder_in_shortcut=False,
        scaling_factor=1.0,
    )


def encode(vae: AutoencoderDC, x: torch.Tensor) -> torch.Tensor:
    """Return the latents of pictures in [-1, 1]."""
    return vae.encode(x).latent


def reconstruct(vae: AutoencoderDC, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decoded latent, and its mean square as a penalty on large latents."""
    z = encode(vae, x)
    return vae.decode(z).sample, z.square().mean()


def normalised(vae: AutoencoderDC, mean: torch.Tensor, std: torch.Tensor) -> AutoencoderDC:
    """Fold ``z -> z / std`` per channel into the two convolutions around the latent, exactly.

    The mean is not folded: the decoder's first convolution pads with zeros, and no bias can
    compensate a shift at the border.
    """
    with torch.no_grad():
        before, after = vae.encoder.conv_out, vae.decoder.conv_in
        before.weight /= std[:, None, None, None]
        before.bias /= std
        after.weight *= std[None, :, None, None]
    return vae


def transformer(settings: Settings) -> SanaTransformer2DModel:
    """Return the untrained transformer with small initial weights (`initial`)."""
    torch.manual_seed(settings.seed + 2)
    net = SanaTransformer2DModel(
        in_channels=settings.latent_channels,
        out_channels=settings.latent_channels,
        num_attention_heads=settings.width // LINEAR_HEAD,
        attention_head_dim=LINEAR_HEAD,
        num_layers=settings.blocks,
        num_cross_attention_heads=settings.heads,
        cross_attention_head_dim=settings.width // settings.heads,
        cross_attention_dim=settings.width,
        caption_channels=settings.text_width,
        mlp_ratio=2.5,
        sample_size=settings.image_size // settings.stride,
        patch_size=1,
    )
    with torch.no_grad():
        for block in net.transformer_blocks:
            pointwise = (block.ff.conv_inverted,)
            inner = (m for m in block.modules() if isinstance(m, torch.nn.Linear) or m in pointwise)
            start_block(block, inner, block.ff.conv_point)
            # The depthwise kernel starts as the identity, so gates and values pass unchanged.
            depth = block.ff.conv_depth
            start_small(depth, 0.02)
            depth.weight[:, :, 1, 1] += 1.0
        start_ends(net.time_embed.linear, net.proj_out)
    return net


def flow(
    net: SanaTransformer2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    hidden: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the predicted flow of latents at times t in (0, 1)."""
    return net(
        x,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=t * 1000,
        return_dict=False,
    )[0]
