"""The fused kernel compiles for GPUs that need not be present: wide accesses, no spills."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.formats.compile_fused import CASES, TARGETS

REGISTERS = 128
"""Of a thread: with them, 16 warps run on a multiprocessor at once."""


def test_the_kernel_compiles_to_wide_accesses_without_spills(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.formats.compile_fused", *TARGETS],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    lines = [words for words in lines if words and words[0] in TARGETS]
    assert [tuple(words[:2]) for words in lines] == [(t, case) for t in TARGETS for case in CASES]
    for target, case, registers, spills, loads, stores in lines:
        assert int(registers) <= REGISTERS and spills == "0", (target, case, registers, spills)
        assert set(stores.split(",")) == {"16"}, (target, case, stores)
        # x by 16 bytes; what a transform reads beside it is small and stays in the cache
        assert set(loads.split(",")) == {"16"} or case.startswith("rotated"), (target, case, loads)
