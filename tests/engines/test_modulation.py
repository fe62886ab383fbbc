"""W4A16 modulation, byte for byte against the packer of auto-round 0.16.1."""

from __future__ import annotations

import pytest
import torch

from loraq.layouts.modulation import pack_modulation, unpack_modulation

pytestmark = pytest.mark.engines


@pytest.mark.parametrize("fields", [3, 6])
def test_auto_round_packs_the_same_bytes(fields):
    module = pytest.importorskip("auto_round.export.svdquant_w4a16")
    g = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(48, 1024, generator=g).bfloat16(), torch.randn(48, generator=g)
    packed = module.quantize_adanorm_w4a16_rtn(weight, bias=bias.bfloat16(), splits=fields)
    ours = pack_modulation(weight, bias.bfloat16(), fields, torch.bfloat16)
    for name, tensor in ours.items():
        assert torch.equal(getattr(packed, name), tensor), name
    found = unpack_modulation("a", ours, fields)["a.weight"]
    assert float((found - weight).norm() / weight.norm()) < 0.15
