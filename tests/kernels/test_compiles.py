"""What the compiler makes of the kernels, with a launch's hints and without a GPU.

The bounds are those of `results/bench/kernel_counts.json` with a little room: a change that hides
an alignment from the compiler, or fills the registers, fails here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

INT4, MXFP4 = "int4, int8 branch", "mxfp4, mxfp8 branch"
# of `linear`: tensor instructions and all instructions of a step of the main product
BOUNDS = {
    ("sm80", INT4): ({"IMMA.16832.S8": 32}, 370),
    ("sm80", MXFP4): ({"HMMA.16816.F32": 64}, 160),
    ("sm90", INT4): ({"IGMMA.64x128x32.S8": 2}, 300),
    ("sm90", MXFP4): ({"HGMMA.64x256x16.F32": 4}, 140),
    ("sm100", INT4): ({"UTCIMMA": 2}, 290),
    ("sm100", MXFP4): ({"UTCOMMA": 2}, 180),
    ("gfx942", INT4): ({"v_mfma_i32_32x32x16_i8": 8}, 215),
    ("gfx942", MXFP4): ({"v_mfma_f32_32x32x8_bf16": 16}, 60),
}


COMPILE = """
import json, sys
from experiments.bench import kernel_counts
for arguments in json.loads(sys.argv[1]):
    sys.argv[1:] = arguments
    kernel_counts.main()
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict, dict]:
    """Target → recipe → kernels: of `linear`, and of the other kernels for one target.

    They are compiled in a process without the interpreter.
    """
    folder = tmp_path_factory.mktemp("compiled")
    targets = sorted({target for target, _ in BOUNDS})
    linear = ["--targets", *targets, "--recipes", INT4, MXFP4, "--kernels", "linear"]
    others = ["--targets", "sm90", "--recipes", INT4, "--kernels", "quantize_input", "down"]
    outputs = [folder / "linear.json", folder / "others.json"]
    pairs = zip((linear, others), outputs, strict=True)
    commands = [[*asked, "--output", str(output)] for asked, output in pairs]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(commands)],
        capture_output=True,
        text=True,
        env=environment | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    first, second = (json.loads(output.read_text())["now"] for output in outputs)
    return first, second


@pytest.mark.parametrize("target, recipe", BOUNDS)
def test_products_use_tensor_cores_wide_loads_and_no_local_memory(compiled, target, recipe):
    (kernel,) = compiled[0][target][recipe]["kernels"]
    tensor, instructions = BOUNDS[target, recipe]
    assert kernel["spills"] == 0 and len(kernel["loops"]) == 2  # main and branch
    main = kernel["loops"][0]
    assert main["tensor"] == tensor and main["instructions"] <= instructions
    # codes by 16 bytes; of scales few loads, of which E8M0's are one byte
    assert main["loads"]["16 bytes"] >= 2 and main["loads"].get("1 bytes", 0) <= 4
    assert main["barriers"] <= (8 if target == "sm100" else 2)


def test_the_other_kernels_compile_without_local_memory(compiled):
    written, down = compiled[1]["sm90"][INT4]["kernels"]
    assert written["spills"] == down["spills"] == 0
    assert down["loops"][0]["tensor"] == {"IGMMA.64x32x32.S8": 2}
    assert down["loops"][0]["instructions"] <= 220
