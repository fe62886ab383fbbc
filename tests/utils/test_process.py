"""Threads of a process are set for a block and restored."""

from __future__ import annotations

import pytest
import torch

from loraq.utils.process import own_gpu, torch_threads


def test_threads_are_restored_whatever_happens_in_the_block():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def test_a_cpu_needs_no_gpu():
    with own_gpu("cpu"):
        assert not torch.cuda.is_initialized()
