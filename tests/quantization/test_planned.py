"""What is planned without weights: the packed layers' shapes, and the work of a step."""

from __future__ import annotations

import functools

import pytest
import torch

from experiments.bench.make_fullsize import meta_model
from experiments.bench.roofline import step_of
from loraq import recipe
from loraq.quantization.model import QuantizedModel
from loraq.quantization.planned import StepShape, planned_layers, step_work
from loraq.quantization.quantizer import quantize_model
from loraq.utils.rates import DEVICES
from tests.quantization.toy import Toy, toy_layers

RECIPES = [
    ["rtn"],
    ["lqer", "quant.transform.shift=true", "quant.branch.rank=4"],
    ["lqer", "quant.transform.hadamard=16", "quant.branch.rank=4", "format@quant.weight=nvfp4"],
    ["lqer", "quant.branch.share_qkv=false", "quant.branch.rank=4", "format@quant.weight=mxint4"],
]


@pytest.mark.parametrize("settings", RECIPES, ids=lambda given: " ".join(given))
def test_planned_layers_have_the_shapes_and_formats_of_packed_ones(settings):
    asked, layers = recipe(*settings), toy_layers()
    made = quantize_model(Toy(), layers, asked, progress=None)
    planned = planned_layers(layers, asked)
    assert QuantizedModel(planned).nbytes == made.nbytes
    for name, packed in made.layers.items():
        for part in ("weight", "left", "right"):
            found, wanted = getattr(planned[name], part), getattr(packed, part)
            assert (found is None) == (wanted is None)
            if wanted is not None:
                shapes = {n: (t.shape, t.dtype) for n, t in wanted.tensors().items()}
                assert {n: (t.shape, t.dtype) for n, t in found.tensors().items()} == shapes
                assert found.format == wanted.format
        assert planned[name].activation == packed.activation
        assert planned[name].branch_activation == packed.branch_activation


@pytest.mark.parametrize("family", ["pixart_sigma", "sana"])
def test_all_blocks_are_like_the_second(family):
    name = {"pixart_sigma": "pixart_sigma", "sana": "sana_1_6b"}[family]
    build = functools.partial(meta_model, name)
    shape = StepShape(images=2, side=16, tokens=8, dtype=torch.bfloat16)
    short = step_work(build, 3, family, shape, recipe("lqer"), fused=True).work
    whole = step_work(lambda _count: build(3), 1, family, shape, recipe("lqer"), fused=True).work
    assert short == whole


def test_one_full_size_block_stays_within_its_launches_and_memory():
    """PixArt-Σ at 1024 px, one image with guidance: a block's work and the peak of a forward."""
    build = functools.partial(meta_model, "pixart_sigma")
    shape = StepShape(images=2, side=128, tokens=300, dtype=torch.bfloat16)
    make = functools.partial(step_work, build, family="pixart_sigma", shape=shape)
    asked = recipe("loraq_best")
    plain, fused, emulated = (
        [make(blocks, recipe=chosen, fused=once) for blocks in (1, 2)]
        for chosen, once in ((None, False), (asked, True), (asked, False))
    )
    launches = [two.work.launches - one.work.launches for one, two in (plain, fused, emulated)]
    assert launches[0] <= 32 and launches[1] <= 104 and launches[2] <= 360
    tokens = 2 * 4096 * 1152 * 2  # bytes of one activation
    assert plain[1].peak < 15 * tokens and fused[1].peak < 25 * tokens
    assert emulated[1].peak < 50 * tokens
    h100 = DEVICES["H100"]
    one, two = (sum(step.work.seconds(h100) for step in pair) for pair in (plain, fused))
    assert one < two < 2.2 * one


def test_the_16_bit_step_is_that_of_an_independent_calculation():
    """0.74 s for 16 images with guidance on an H100, and the arithmetic from shapes alone."""
    work = step_of("pixart_sigma", "16-bit").work
    rows, width, tokens = 32 * 4096, 1152, 4096
    projections = 2 * rows * width**2 * (4 + 2 + 8)  # q k v out, cross q out, ff up and down
    cross_kv = 2 * 32 * 300 * width**2 * 2
    attention = 2 * 2 * rows * width * (tokens + 300)
    blocks = 28 * (projections + cross_kv + attention)
    assert work.flops == pytest.approx(blocks, rel=0.01)
    assert work.seconds(DEVICES["H100"]) == pytest.approx(0.74, rel=0.15)
