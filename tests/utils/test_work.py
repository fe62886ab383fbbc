"""Counting the work of a computation on meta tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from loraq.utils.rates import DEVICES, UNKNOWN, Rates, gpu_rates
from loraq.utils.work import Counted, Kernel

KB = 256 * 4  # bytes of 16×16 float32 values
RATES = Rates("a device", flops=1e6, bandwidth=1e3, launch=0.5, memory=1e9)


def square(*leading: int) -> torch.Tensor:
    return torch.empty(*leading, 16, 16, device="meta")


@pytest.mark.parametrize(
    ("call", "flops", "size"),
    [
        (lambda x, y: x @ y, 2 * 16**3, 3),
        (lambda x, y: x + y, 0, 3),
        (lambda x, y: x.add_(y), 0, 3),
        (lambda x, y: torch.div(x, 2, out=y), 0, 2),
        (lambda x, y: x.copy_(y), 0, 2),
        (lambda x, y: x + y[:1, :1].expand(16, 16), 0, 3),
        (lambda x, y: x.view(8, 32).mT.clone(), 0, 2),
        (lambda x, y: F.scaled_dot_product_attention(x, y, y), 2 * 2 * 16**3, 4),
    ],
)
def test_one_kernel_with_its_operations_and_bytes(call, flops, size):
    x, y = square(), square()
    with Counted() as counted:
        call(x, y)
    assert counted.work.launches == 1
    assert counted.work.flops == flops and counted.work.bytes == size * KB


def test_views_and_allocations_launch_nothing():
    x = square()
    with Counted() as counted:
        x.view(256)[::2].unsqueeze(0), torch.empty_like(x), x.detach().mT
    assert counted.work.launches == 0


def test_the_peak_is_what_is_alive_at_once():
    x = square()
    with Counted() as counted:
        y = x + 1
        z = y.view(256)
        del y  # z holds its memory
        w = z * 2
        del z
        v = w * 3
        del w, v
    assert counted.peak == 2 * KB


def test_a_kernel_takes_the_longest_of_launch_arithmetic_and_traffic():
    assert Kernel("small", 10, 10).seconds(RATES) == 0.5
    assert Kernel("a product", 5_000_000, 10).seconds(RATES) == 5
    assert Kernel("a pass", 10, 3000).seconds(RATES) == 3


def test_work_adds_up():
    with Counted() as counted:
        square() + 1
    once = counted.work
    assert (once + once).launches == 2 and once.plus(once, -1).launches == 0
    assert once.plus(once, 3).seconds(RATES) == 4 * once.seconds(RATES)


def test_a_gpu_is_known_by_its_name_and_an_unknown_one_is_assumed_slow():
    assert gpu_rates("NVIDIA H100 80GB HBM3").name == "H100"
    assert gpu_rates("AMD Instinct MI300X").name == "MI300X"
    assert gpu_rates("NVIDIA GeForce RTX 4090").name == "4090"
    for name in ("NVIDIA Tesla T4", None):
        assert gpu_rates(name) is UNKNOWN and "unknown" in UNKNOWN.name
    assert all(UNKNOWN.bandwidth < rates.bandwidth for rates in DEVICES.values())
