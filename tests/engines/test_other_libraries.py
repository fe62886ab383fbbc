"""Layers that other libraries quantise: what they hold is counted, and they compute."""

from __future__ import annotations

import math

import pytest
import torch

from experiments.bench.other_libraries import METHODS
from loraq.models.held import held_memory
from loraq.models.layers import list_layers
from tests.diffusers.test_checkpoints import forward
from tests.little import little_pixart

pytestmark = pytest.mark.engines

BITS = {
    "sdnq_int4": (4, 7),
    "sdnq_svd": (4, 40),  # its factors of rank 32 are in 32 bits here, beside 64 channels
    "torchao_int4": (8, 8.8),
    "torchao_int8": (8, 8.8),
    "torchao_w8a8": (8, 8.8),
    "bnb_nf4": (4, 5),
    "bnb_fp4": (4, 5),
    "bnb_int8": (8, 8.8),
    "quanto_int4": (4, 6),
    "quanto_int8": (8, 8.8),
    "gguf_q4_0": (4.5, 4.5),
    "gguf_q8_0": (8.5, 8.5),
}


@pytest.mark.parametrize("name", METHODS)
def test_layers_of_a_library_are_counted_and_compute(name):
    network = little_pixart().transformer.requires_grad_(False)
    before = forward(network)
    # SDNQ leaves smaller layers as they are
    layers = [e for e in list_layers(network, "pixart_sigma") if math.prod(e.shape) >= 16384]
    METHODS[name].quantize(network, [layer.name for layer in layers])
    held = held_memory(network)
    least, most = BITS[name]
    assert held.quantized_weights == sum(out * width for out, width in (e.shape for e in layers))
    assert least <= held.quantized_bits_per_weight <= most
    error = torch.linalg.vector_norm(forward(network) - before) / torch.linalg.vector_norm(before)
    assert 0 < error < 0.3
