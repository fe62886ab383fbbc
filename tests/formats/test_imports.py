"""The table of formats, and composing configurations with it, do not import torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

import loraq.formats

TABLE = "from loraq.formats import get_format; get_format('nvfp4', tensor_scale='token').label"
ROWS = "from loraq.compose import load_rows; assert len(load_rows(['experiment=table1'])) == 26"
CPU_SECONDS = 1.0


def cpu_seconds(code: str) -> float:
    """CPU time of a fresh process that runs `code`, imports included; fails if it imports torch."""
    code += "; import sys, time; assert 'torch' not in sys.modules; print(time.process_time())"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return float(found.stdout)


def test_the_table_of_formats_does_not_import_torch():
    cpu_seconds(TABLE)


def test_composing_an_experiment_takes_a_second_without_torch():
    spent = [cpu_seconds(ROWS)]
    while min(spent) > CPU_SECONDS and len(spent) < 3:  # other processes slow a core down
        spent.append(cpu_seconds(ROWS))
    assert min(spent) <= CPU_SECONDS, spent


def test_public_names_exist_and_unknown_ones_do_not():
    assert all(hasattr(loraq.formats, name) for name in loraq.formats.__all__)
    assert callable(loraq.formats.quantize)  # the function, not a module
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        loraq.formats.quantise  # noqa: B018
