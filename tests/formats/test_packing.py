"""Packed bytes: examples computed by hand, and round trips for many lengths."""

from __future__ import annotations

import pytest
import torch

from loraq.formats.packing import pack, packed_bytes, unpack


def test_even_index_is_the_low_nibble():
    codes = torch.tensor([[0x1, 0x2, 0xF]], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [[0x21, 0x0F]]


def test_four_six_bit_codes_in_three_bytes():
    codes = [0b000001, 0b100010, 0b111000, 0b101101]
    word = codes[0] | codes[1] << 6 | codes[2] << 12 | codes[3] << 18
    data = pack(torch.tensor(codes, dtype=torch.uint8), 6)
    assert bytes(data.tolist()) == word.to_bytes(3, "little")


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("count", [*range(1, 18), 38, 64, 5600])
def test_round_trip_and_size(bits, count):
    generator = torch.Generator().manual_seed(count)
    codes = torch.randint(0, 2**bits, (2, 3, count), generator=generator).to(torch.uint8)
    data = pack(codes, bits)
    assert data.shape == (2, 3, -(-count * bits // 8)) and data.is_contiguous()
    assert packed_bytes(count, bits) == data.shape[-1]
    assert torch.equal(unpack(data, bits, count), codes)


@pytest.mark.parametrize("bits", [4, 6])
def test_unused_bits_are_zero(bits):
    data = pack(torch.full((1,), 2**bits - 1, dtype=torch.uint8), bits)
    assert data.tolist() == [2**bits - 1]
