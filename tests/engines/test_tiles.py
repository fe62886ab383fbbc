"""Packed tiles, byte for byte against the packers of cache-dit 1.5.3 and auto-round 0.16.1."""

from __future__ import annotations

import pytest
import torch

from loraq.formats import dequantize, get_format, quantize
from loraq.formats.packing import unpack
from loraq.layouts.tiles import CODES, DOWN, GROUP_SCALES, MICRO_SCALES, UP, pack_vector, padded
from tests.layouts.numbered import numbered

pytestmark = pytest.mark.engines
SHAPES = [(128, 256, 16), (256, 128, 32), (384, 256, 48)]


def halves(rows: int, columns: int) -> torch.Tensor:
    return numbered(rows, columns).half()


@pytest.mark.parametrize(("out", "width", "rank"), SHAPES)
def test_cache_dit_packs_the_same_bytes(out, width, rank):
    packing = pytest.importorskip("cache_dit.quantization.svdquant.packing")
    packer = packing.SVDQWeightPacker(bits=4)
    codes = numbered(out, width // 2)
    assert torch.equal(
        packer.pack_weight(unpack(codes, 4, width).int()), CODES.pack(codes).view(torch.int8)
    )
    scales = halves(out, width // 64)
    assert torch.equal(packer.pack_scale(scales.view(out, 1, -1, 1), 64), GROUP_SCALES.pack(scales))
    bits = numbered(out, width // 16) & 0x7E  # positive and finite
    micro = packer.pack_micro_scale(bits.view(torch.float8_e4m3fn).half().view(out, 1, -1, 1), 16)
    assert torch.equal(micro.view(torch.uint8), MICRO_SCALES[16].pack(bits))
    vector = halves(out, 1)
    assert torch.equal(packer.pack_scale(vector, -1), pack_vector(vector[:, 0]))
    down, up = halves(rank, width), halves(out, rank)
    assert torch.equal(packer.pack_lowrank_weight(down, down=True), DOWN.pack(down))
    assert torch.equal(packer.pack_lowrank_weight(up, down=False), UP.pack(up))


def test_cache_dit_pads_alike():
    packing = pytest.importorskip("cache_dit.quantization.svdquant.packing")
    packer = packing.SVDQWeightPacker(bits=4)
    scales = halves(100, 3)
    expected = packer.pack_scale(packer.pad_scale(scales, 64), 64)
    assert torch.equal(expected, GROUP_SCALES.pack(padded(scales, (128, 2), 1)))
    factor = halves(20, 100)
    expected = packer.pack_lowrank_weight(packer.pad_lowrank_weight(factor, True), True)
    assert torch.equal(expected, DOWN.pack(padded(factor, (16, 128))))


@pytest.mark.parametrize(("out", "width", "rank"), SHAPES)
def test_auto_round_packs_the_same_bytes(out, width, rank):
    mxfp4 = pytest.importorskip("auto_round.export.svdquant_mxfp4")
    packer = mxfp4.NunchakuMXFP4Packer()
    codes, scales = numbered(out, width // 2), numbered(out, width // 32)
    assert torch.equal(
        packer._pack_weight_codes(unpack(codes, 4, width)), CODES.pack(codes).view(torch.int8)
    )
    assert torch.equal(packer._pack_scale_codes(scales), MICRO_SCALES[32].pack(scales))
    down = halves(rank, width)
    assert torch.equal(
        mxfp4.pack_lowrank_weight(down, down=True), DOWN.pack(padded(down, (16, 128)))
    )


@pytest.mark.parametrize(("out", "width"), [(128, 128), (200, 160)])
def test_auto_round_decodes_our_weight_exactly(out, width):
    mxfp4 = pytest.importorskip("auto_round.export.svdquant_mxfp4")
    w_OI = torch.randn(out, width, generator=torch.Generator().manual_seed(0))
    packed = quantize(w_OI, get_format("mxfp4_e2m1", exponent="even"))
    codes = CODES.pack(padded(packed.codes, (128, 64))).view(torch.int8)
    scales = MICRO_SCALES[32].pack(padded(packed.scale, (128, 4), 127))
    found = mxfp4.NunchakuMXFP4Packer().unpack_residual(codes, scales, (out, width))
    assert torch.equal(found, dequantize(packed))
