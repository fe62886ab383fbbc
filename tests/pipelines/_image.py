"""The smallest autoencoders and flow schedulers of the published classes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import diffusers

SQUARE = {"height": 64, "width": 64, "max_sequence_length": 8}
STRIDE_8 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
}


def shifted_autoencoder() -> diffusers.AutoencoderKL:
    """Stride 8, four latent channels, with the scale and shift of FLUX.1 and no quant_conv."""
    import diffusers

    return diffusers.AutoencoderKL(
        **STRIDE_8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def autoencoder_dc() -> diffusers.AutoencoderDC:
    """Stride 8, four latent channels."""
    import diffusers

    each = {}
    for side in ("encoder", "decoder"):
        each[f"{side}_block_types"] = "ResBlock"
        each[f"{side}_block_out_channels"] = (8, 8, 8, 8)
        each[f"{side}_layers_per_block"] = (1, 1, 1, 1)
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4,
        **each,
    )


def flow_scheduler(dynamic: bool = True) -> diffusers.FlowMatchEulerDiscreteScheduler:
    """Euler steps along the flow; `dynamic`: the shift follows the number of tokens (FLUX)."""
    import diffusers

    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic)
