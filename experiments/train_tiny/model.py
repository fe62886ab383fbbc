"""The transformer, its scheduler and the assembled ``PixArtSigmaPipeline``."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DPMSolverMultistepScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
)
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from .settings import SETTINGS, Settings


def transformer(settings: Settings = SETTINGS) -> PixArtTransformer2DModel:
    """Return the untrained transformer; block weights start small so that training outgrows them.

    Every residual branch starts near zero (output projections zero, gates one), which lets a rate
    of
    1e-3 work from the first step and leaves no large random matrix behind for a quantiser to see.
    """
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
            for module in block.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.normal_(std=0.01)
                    module.bias.zero_()
            for module in (block.attn1.to_out[0], block.attn2.to_out[0], block.ff.net[2]):
                module.weight.normal_(std=0.002)
            # Rows: shift, scale, gate of the self-attention, then of the feed-forward.
            block.scale_shift_table.zero_()
            block.scale_shift_table[[2, 5]] = 1.0
        net.adaln_single.linear.weight.normal_(std=0.005)
        net.adaln_single.linear.bias.zero_()
        net.proj_out.weight.zero_()
        net.proj_out.bias.zero_()
    return net


def scheduler() -> DPMSolverMultistepScheduler:
    """Return the second-order DPM solver over flow sigmas (x_t = (1 - t) x_0 + t noise, prediction
    noise - x_0)."""
    return DPMSolverMultistepScheduler(
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=1.0,
        algorithm_type="dpmsolver++",
        solver_order=2,
        final_sigmas_type="zero",
    )


def pipeline(
    tokenizer: PreTrainedTokenizerFast,
    text_encoder: T5EncoderModel,
    vae: AutoencoderKL,
    net: PixArtTransformer2DModel,
) -> PixArtSigmaPipeline:
    """Return the unmodified pipeline over the four parts."""
    pipe = PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        vae=vae,
        transformer=net,
        scheduler=scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def sample(
    pipe: PixArtSigmaPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int = SETTINGS.inference_steps,
    guidance: float = SETTINGS.guidance,
    settings: Settings = SETTINGS,
    pixels: int | None = None,
) -> torch.Tensor:
    """Return images in [-1, 1], [n, 3, pixels, pixels], one seed per prompt."""
    pixels = pixels or settings.image_size
    shape = (1, settings.latent_channels, pixels // 8, pixels // 8)
    noise = [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
    latents = torch.cat(noise).to(pipe.transformer.device, pipe.transformer.dtype)
    out = pipe(
        prompts,
        height=pixels,
        width=pixels,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        max_sequence_length=settings.text_length,
        use_resolution_binning=False,
        clean_caption=False,
        output_type="pt",
    ).images
    return out * 2 - 1
