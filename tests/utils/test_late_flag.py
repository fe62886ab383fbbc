"""A loop's stop flag: read at once on a CPU, a round late on a GPU."""

from __future__ import annotations

import torch

from loraq.utils.late_flag import LateFlag
from tests.simulated import simulated_cuda


def test_a_flag_is_read_at_once_on_a_cpu_and_a_round_late_on_a_gpu():
    here = LateFlag()
    assert [here.read(torch.tensor(flag)) for flag in (False, True)] == [False, True]
    with simulated_cuda() as device:
        there = LateFlag()
        flags = [torch.tensor(flag, device="cuda") for flag in (False, True, True)]
        assert [there.read(flag) for flag in flags] == [False, False, True]
        assert {kind for kind, _ in device.waits} == {"event"}, "not for the round itself"


def test_the_event_belongs_to_the_flag_s_gpu_not_to_the_current_one():
    """Otherwise the flag of a model on another GPU is read before it has arrived."""
    with simulated_cuda(count=2, current=1) as device:
        there = LateFlag()
        for _ in range(2):
            there.read(torch.tensor(True, device="cuda:0"))
        assert {kind for kind, _ in device.waits} == {"event"}
