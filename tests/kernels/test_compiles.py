"""Every kernel compiles for the GPUs that the README names, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100", "gfx942"])
def test_kernels_compile(target, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for", target],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [line.split() for line in found.stdout.splitlines()]
    lines = [tuple(words[1:]) for words in lines if words[:1] == [target]]
    assert len(lines) == 3 * 4
    assert lines[1:3] == [("down", "int8"), ("linear", "int8")]  # INT4 with a W4A8 branch
