"""Small initial weights of the transformers, so that training dominates the random matrices."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from diffusers import AutoencoderKL
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

BRANCH, OUTPUT, TIME = 0.01, 0.002, 0.005  # standard deviations
LOG_VARIANCE = -6.0


def start_small(module: nn.Module, std: float) -> None:
    """Initialise the weight with N(0, std²) and the bias, if any, with 0."""
    module.weight.normal_(std=std)
    if module.bias is not None:
        module.bias.zero_()


def start_block(block: nn.Module, inner: Iterable[nn.Module], output: nn.Module) -> None:
    """Initialise a block with small weights, smaller at the ends of its three residual branches.

    With gates at one, every branch starts near zero: a learning rate of 1e-3 works from the first
    step, and no large random matrix remains in the trained weights. ``inner``: modules to
    initialise, in order; ``output``: the last layer of the feed-forward.
    """
    for module in inner:
        start_small(module, BRANCH)
    for module in (block.attn1.to_out[0], block.attn2.to_out[0], output):
        module.weight.normal_(std=OUTPUT)
    # Rows: shift, scale, gate of the self-attention, then of the feed-forward.
    block.scale_shift_table.zero_()
    block.scale_shift_table[[2, 5]] = 1.0


def start_ends(time: nn.Module, output: nn.Module) -> None:
    """Initialise the time conditioning with small weights and the output layer with zeros."""
    start_small(time, TIME)
    output.weight.zero_()
    output.bias.zero_()


@torch.no_grad()
def start_autoencoder(vae: AutoencoderKL) -> None:
    """Initialise an `AutoencoderKL` so that colours pass through it from the first step.

    PyTorch's convolutions shrink their input's variance to a third, and a latent starts as noise of
    variance 1: the rarer hues then never enter the latent, however long the training. Here a
    convolution keeps the variance, the residual branches start at zero, and so does the noise.
    """
    for module in vae.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            nn.init.zeros_(module.bias)
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
    noise = vae.quant_conv.out_channels // 2  # the second half is the logarithm of the variance
    vae.quant_conv.weight[noise:] *= 0.01
    vae.quant_conv.bias[noise:] = LOG_VARIANCE
