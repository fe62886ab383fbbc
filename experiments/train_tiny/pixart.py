"""PixArt's networks: T5 encoder, `AutoencoderKL`, `PixArtTransformer2DModel`, its pipeline."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtSigmaPipeline, PixArtTransformer2DModel
from transformers import T5Config, T5EncoderModel

from .common import components as components
from .common import conditions as conditions
from .common import pack as pack
from .common import scheduler as scheduler
from .initial import start_autoencoder, start_block, start_ends
from .settings import Settings

PIPELINE = PixArtSigmaPipeline
CENTRED = True  # latents have zero mean
CALL: dict[str, Any] = {"use_resolution_binning": False, "clean_caption": False}


def arguments(guidance: float, count: int) -> dict[str, Any]:
    """Return the call's arguments for a number of prompts."""
    return {"guidance_scale": guidance, **CALL}


def encoder(settings: Settings) -> T5EncoderModel:
    """Return an untrained two-layer T5 encoder of width ``text_width``."""
    torch.manual_seed(settings.seed + 1)
    config = T5Config(
        vocab_size=settings.vocab_size,
        d_model=settings.text_width,
        d_kv=64,
        d_ff=2 * settings.text_width,
        num_layers=2,
        num_heads=settings.text_width // 64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return T5EncoderModel(config)


def autoencoder(settings: Settings) -> AutoencoderKL:
    """Return an untrained autoencoder of stride 8."""
    torch.manual_seed(settings.seed)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=settings.latent_channels,
        norm_num_groups=2,
        mid_block_add_attention=False,
        sample_size=settings.image_size,
        scaling_factor=1.0,
    )
    start_autoencoder(vae)
    return vae


def encode(vae: AutoencoderKL, x: torch.Tensor) -> torch.Tensor:
    """Return the posterior means of pictures in [-1, 1]."""
    return vae.encode(x).latent_dist.mean


def reconstruct(vae: AutoencoderKL, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decoded sample of the posterior, and its KL divergence from N(0, 1)."""
    posterior = vae.encode(x).latent_dist
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
    return vae.decode(posterior.sample()).sample, kl.mean()


def normalised(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> AutoencoderKL:
    """Fold ``z -> (z - mean) / std`` per channel into the two 1 x 1 convolutions around the latent.

    Exact in real numbers: the convolution before the latent applies the affine map, the one after
    it applies the inverse, and the log-variances shift by ``-2 log std``.
    """
    c = len(mean)
    with torch.no_grad():
        before, after = vae.quant_conv, vae.post_quant_conv
        before.weight[:c] /= std[:, None, None, None]
        before.bias[:c] = (before.bias[:c] - mean) / std
        before.bias[c:] -= 2 * std.log()
        after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
        after.weight *= std[None, :, None, None]
    return vae


def transformer(settings: Settings) -> PixArtTransformer2DModel:
    """Return the untrained transformer with small initial weights (`initial`)."""
    torch.manual_seed(settings.seed + 2)
    latent = settings.image_size // 8
    net = PixArtTransformer2DModel(
        num_attention_heads=settings.heads,
        attention_head_dim=settings.width // settings.heads,
        in_channels=settings.latent_channels,
        out_channels=2 * settings.latent_channels,
        num_layers=settings.blocks,
        cross_attention_dim=settings.width,
        caption_channels=settings.text_width,
        sample_size=latent,
        patch_size=2,
        attention_bias=True,
        norm_type="ada_norm_single",
        activation_fn="gelu-approximate",
        use_additional_conditions=False,
    )
    with torch.no_grad():
        for block in net.transformer_blocks:
            inner = (m for m in block.modules() if isinstance(m, torch.nn.Linear))
            start_block(block, inner, block.ff.net[2])
        start_ends(net.adaln_single.linear, net.proj_out)
    return net


def flow(
    net: PixArtTransformer2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    hidden: torch.Tensor,
    mask: torch.Tensor,
) -> torch.Tensor:
    """Return the predicted flow of latents at times t in (0, 1)."""
    out = net(
        x,
        encoder_hidden_states=hidden,
        encoder_attention_mask=mask,
        timestep=t * 1000,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        return_dict=False,
    )[0]
    # The second half is the learned variance of a Sigma checkpoint, which is not used.
    return out[:, : x.shape[1]]
