"""Largest batch size: extrapolation from two trials, memory measurements, and the command."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loraq.cli import main
from loraq.errors import LoraqError
from loraq.runner.batch_size import SHARE, largest_batch
from loraq.utils.memory import anonymous_bytes, free_bytes, peak

MIB = 2**20
sizes = st.integers(1, 10**6)


@given(sizes, sizes, sizes, st.integers(1, 4096))
def test_the_batch_size_fits_and_one_image_more_does_not(fixed, each, free, most):
    peaks = {1: fixed + each, 2: fixed + 2 * each}
    each = max(each, peaks[1] / 4)  # lower limit of the slope
    fixed = max(0, peaks[1] - each)
    if fixed + each > SHARE * free:
        with pytest.raises(LoraqError, match="One image needs"):
            largest_batch(peaks, free, most)
        return
    size = largest_batch(peaks, free, most)
    assert 1 <= size <= most
    assert fixed + size * each <= SHARE * free * (1 + 1e-9)
    assert size == most or fixed + (size + 1) * each > SHARE * free * (1 - 1e-9)


def test_every_image_needs_memory_even_if_the_trials_show_no_growth():
    assert largest_batch({1: 100, 2: 90}, 1000, 10**6) <= 36


# A process of its own: here, an allocation may be served from memory that earlier tests freed.
MAPPED_AND_ALLOCATED = """
import sys, time
import numpy as np
from loraq.utils.memory import INTERVAL, held_bytes, peak

file = sys.argv[1]
np.zeros(64 << 20, np.uint8).tofile(file)
before = held_bytes("cpu")
with peak("cpu") as found:
    assert int(np.memmap(file, mode="r").max()) == 0
    held = np.ones(100 << 20, np.uint8)
    time.sleep(10 * INTERVAL)  # memory is sampled
    assert held[-1] == 1
print(found.top - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells allocated from mapped pages")
def test_the_peak_counts_allocated_and_not_mapped_memory(tmp_path):
    command = [sys.executable, "-c", MAPPED_AND_ALLOCATED, str(tmp_path / "weights")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 95 * MIB < grown < 130 * MIB
    assert free_bytes("cpu") > 100 * MIB


def test_the_peak_of_a_block_shorter_than_a_sample_is_not_zero():
    with peak("cpu") as found:
        pass
    assert found.top > 0


def test_memory_of_another_process_and_of_one_that_has_ended():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        assert anonymous_bytes(process.pid) > 0
        process.communicate(b"\n")
    assert anonymous_bytes(process.pid) == 0


@pytest.mark.parametrize("method", ["reference", "loraq_o2"])
def test_the_command_prints_a_batch_size_for_the_row(overrides, capsys, method):
    main(["fit", f"method={method}", *overrides, "--quiet"])
    printed = capsys.readouterr().out
    assert "generate.batch_size=4 takes" in printed  # no more than there are prompts
    assert "GiB for 1" in printed and "GiB for 2" in printed
