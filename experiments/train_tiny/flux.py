"""FLUX's networks: CLIP and T5 encoders, `AutoencoderKL`, `FluxTransformer2DModel`, its pipeline.

Guidance is true classifier-free guidance, as for the other two models: one training serves it, and
captions are dropped anyway. A distilled model would need a second training against the first one.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from . import pixart
from .initial import BRANCH, OUTPUT, TIME, start_small
from .pixart import encode as encode
from .pixart import normalised as normalised
from .pixart import reconstruct as reconstruct
from .settings import Settings

PIPELINE = FluxPipeline
CENTRED = True  # latents have zero mean
AXES = (8, 28, 28)  # rotary channels of a head of 64: the shares of FLUX's (16, 56, 56) of 128


class TextEncoders(nn.Module):
    """CLIP, whose pooled output modulates every block, and T5, whose tokens join the picture's."""

    def __init__(self, settings: Settings):
        """Build both untrained; they read the same tokens."""
        super().__init__()
        torch.manual_seed(settings.seed + 3)
        width = settings.pooled_width
        config = CLIPTextConfig(
            vocab_size=settings.vocab_size,
            hidden_size=width,
            intermediate_size=2 * width,
            projection_dim=width,
            num_hidden_layers=2,
            num_attention_heads=width // 64,
            max_position_embeddings=settings.text_length,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=1,
        )
        self.clip = CLIPTextModel(config)
        self.t5 = pixart.encoder(settings)


def encoder(settings: Settings) -> TextEncoders:
    """Return the untrained text encoders."""
    return TextEncoders(settings)


def conditions(
    text: TextEncoders, ids: torch.Tensor, mask: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return T5's hidden states [n, tokens, width] and CLIP's pooled output [n, pooled_width].

    ``mask`` is unused: FLUX's pipeline shows its encoders and its transformer the padding as well.
    """
    return text.t5(input_ids=ids).last_hidden_state, text.clip(input_ids=ids).pooler_output


def components(tokenizer: PreTrainedTokenizerFast, text: TextEncoders) -> dict[str, Any]:
    """Return the pipeline's text components."""
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": tokenizer,
        "text_encoder": text.clip,
        "text_encoder_2": text.t5,
    }


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Return FLUX.1's solver: Euler steps over sigmas, shifted by the number of tokens."""
    return FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )


def arguments(guidance: float, count: int) -> dict[str, Any]:
    """Return the call's arguments for a number of prompts.

    The pipeline guides by ``true_cfg_scale`` and only with a negative prompt.
    """
    return {"true_cfg_scale": guidance, "negative_prompt": [""] * count}


def autoencoder(settings: Settings) -> AutoencoderKL:
    """Return an untrained autoencoder of stride 8, whose latents the pipeline does not shift."""
    vae = pixart.autoencoder(settings)
    vae.register_to_config(shift_factor=0.0)
    return vae


def transformer(settings: Settings) -> FluxTransformer2DModel:
    """Return the untrained transformer with small initial weights and open gates."""
    torch.manual_seed(settings.seed + 2)
    net = FluxTransformer2DModel(
        in_channels=4 * settings.latent_channels,
        num_layers=settings.blocks,
        num_single_layers=settings.single_blocks,
        attention_head_dim=settings.width // settings.heads,
        num_attention_heads=settings.heads,
        joint_attention_dim=settings.text_width,
        pooled_projection_dim=settings.pooled_width,
        guidance_embeds=False,
        axes_dims_rope=AXES,
    )
    with torch.no_grad():
        for block in (*net.transformer_blocks, *net.single_transformer_blocks):
            for name, module in block.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                if name.startswith("norm"):
                    # Rows: shift, scale, gate per branch. Gates of one keep a branch alive.
                    start_small(module, TIME)
                    module.bias.view(-1, 3, settings.width)[:, 2] = 1.0
                else:
                    ends = name.endswith(("to_out.0", "to_add_out", "net.2", "proj_out"))
                    start_small(module, OUTPUT if ends else BRANCH)
        start_small(net.norm_out.linear, TIME)
        net.proj_out.weight.zero_()
        net.proj_out.bias.zero_()
    return net


def pack(latents: torch.Tensor) -> torch.Tensor:
    """Return latents [n, c, s, s] as tokens of 2 x 2 patches, [n, s²/4, 4 c]."""
    return FluxPipeline._pack_latents(latents, *latents.shape)


def flow(
    net: FluxTransformer2DModel,
    x: torch.Tensor,
    t: torch.Tensor,
    hidden: torch.Tensor,
    pooled: torch.Tensor,
) -> torch.Tensor:
    """Return the predicted flow of latents at times t in (0, 1)."""
    side = x.shape[-1]
    out = net(
        pack(x),
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
        timestep=t,  # the network itself multiplies by 1000
        img_ids=FluxPipeline._prepare_latent_image_ids(
            len(x), side // 2, side // 2, x.device, x.dtype
        ),
        txt_ids=x.new_zeros(hidden.shape[1], 3),
        return_dict=False,
    )[0]
    return FluxPipeline._unpack_latents(out, side, side, 1)
