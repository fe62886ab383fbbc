"""Offloading, compiling, casting and fusing of packed models: right, or refused by name.

On a GPU that is not there (`tests/simulated`), or with the CPU in its place where accelerate and
diffusers set tensors in ways that the simulation does not know.
"""

from __future__ import annotations

import copy

import pytest
import torch

from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.utils import batch_invariance
from tests.diffusers.test_checkpoints import forward, quantised
from tests.little import little_pixart
from tests.simulated import simulated_cuda

CPU = torch.device("cpu")
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(scope="module")
def packed():
    pipe = little_pixart()
    quantised(pipe, "rtn")
    return pipe


@pytest.fixture
def pipe(packed):
    return copy.deepcopy(packed)


def layers(pipe) -> list[QuantizedLinear]:
    return [m for m in pipe.transformer.modules() if isinstance(m, QuantizedLinear)]


def operands(pipe) -> int:
    """Packed layers that hold operands."""
    return sum(layer._cache is not None for layer in layers(pipe))


def test_model_offload_takes_everything_off_the_device(pipe, monkeypatch):
    monkeypatch.setattr(batch_invariance, "use_onednn", lambda device: False)
    before = forward(pipe.transformer)
    with simulated_cuda():
        pipe.enable_model_cpu_offload(device="cuda")
        assert torch.equal(forward(pipe.transformer, "cuda").cpu(), before)
        assert {layer.weight_codes.device.type for layer in layers(pipe)} == {"cuda"}
        pipe.maybe_free_model_hooks()
    assert {layer.weight_codes.device for layer in layers(pipe)} == {CPU} and not operands(pipe)


def sequential(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, execution_device=CPU, offload_buffers=True)


def blocks(pipe):
    pipe.transformer.enable_group_offload(CPU, CPU, num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [sequential, blocks])
def test_offloaded_layers_hold_no_operands_after_a_forward(pipe, offload):
    before = forward(pipe.transformer)
    assert operands(pipe)
    offload(pipe)
    for _ in range(2):
        assert torch.equal(forward(pipe.transformer), before)
        assert operands(pipe) == 0


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda net: net.enable_group_offload(CPU, offload_type="leaf_level"), "'block_level'"),
        (lambda net: net.enable_group_offload(CPU, use_stream=True), "use_stream=False"),
        (lambda net: net.fuse_qkv_projections(), "packed layers have none. Leave it out"),
    ],
)
def test_what_packed_layers_cannot_do_is_refused(pipe, call, words):
    before = forward(pipe.transformer)
    with pytest.raises(LoraqError, match=words):
        call(pipe.transformer)
    assert torch.equal(forward(pipe.transformer), before)


def test_a_reverted_model_can_do_it_again():
    pipe = little_pixart()
    quantised(pipe, "rtn").revert(pipe)
    pipe.transformer.fuse_qkv_projections()
    pipe.transformer.enable_group_offload(CPU, offload_type="leaf_level")
    assert forward(pipe.transformer).isfinite().all()


def test_casting_reaches_the_16_bit_layers_alone(pipe):
    layer = layers(pipe)[0]
    x = torch.randn(3, layer.in_features)
    before = layer(x)
    pipe.transformer.enable_layerwise_casting(FLOAT8, torch.float32)
    assert pipe.transformer.transformer_blocks[0].attn2.to_k.weight.dtype == FLOAT8
    assert torch.equal(layer(x), before)
    for cast in (lambda: pipe.transformer.to(torch.bfloat16), pipe.transformer.half):
        with pytest.raises(ValueError, match="quantized"):
            cast()
