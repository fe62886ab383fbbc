"""How a transformer to be trained starts: small, so that training outgrows the random matrices."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

BRANCH, OUTPUT, TIME = 0.01, 0.002, 0.005  # standard deviations


def start_small(module: nn.Module, std: float) -> None:
    """Draw the weight anew and zero the bias, if there is one."""
    module.weight.normal_(std=std)
    if module.bias is not None:
        module.bias.zero_()


def start_block(block: nn.Module, inner: Iterable[nn.Module], output: nn.Module) -> None:
    """Small weights everywhere, smaller ones where the block's three residual branches end.

    With gates at one, every branch starts near zero: a rate of 1e-3 works from the first step, and
    no large random matrix is left behind for a quantiser. ``inner``: what to draw, in order;
    ``output``: the feed-forward's last layer.
    """
    for module in inner:
        start_small(module, BRANCH)
    for module in (block.attn1.to_out[0], block.attn2.to_out[0], output):
        module.weight.normal_(std=OUTPUT)
    # Rows: shift, scale, gate of the self-attention, then of the feed-forward.
    block.scale_shift_table.zero_()
    block.scale_shift_table[[2, 5]] = 1.0


def start_ends(time: nn.Module, output: nn.Module) -> None:
    """A small time conditioning; an output layer of zeros."""
    start_small(time, TIME)
    output.weight.zero_()
    output.bias.zero_()
