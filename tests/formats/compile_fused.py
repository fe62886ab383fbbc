"""Compile the fused kernel for GPUs that need not be present, and print what it takes of them.

python -m tests.formats.compile_fused TARGET …    (sm80 sm90 sm100 gfx942)

A line: target, case, registers, instructions that spill, then bytes per load and per store.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from loraq.formats import get_format
from loraq.formats.triton import fake
from loraq.formats.triton.fake import NOTHING, Before

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TOKENS, WIDTH = 4096, 1152
LAYER = (get_format("int4"), get_format("int8"))
TURNED = Before(
    smooth_I=torch.ones(WIDTH).bfloat16(),
    signs_I=torch.ones(WIDTH).char(),
    rotation=torch.eye(64).bfloat16(),
)
CASES = {
    "int4+int8": (LAYER, NOTHING),
    "rotated-int4+int8": (LAYER, TURNED),
    "nvfp4-token": ((get_format("nvfp4", tensor_scale="token"),), NOTHING),
}
BYTES = {"ushort": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}


class Compiler:
    """Replaces the kernel: compiles each launch as Triton does, instead of running it."""

    def __init__(self, kernel, target: str, case: str) -> None:
        self.kernel, self.target, self.case = kernel, target, case

    def __getitem__(self, _grid):
        return self.compile

    def compile(self, *arguments, **options) -> None:
        gpu, kernel = TARGETS[self.target], self.kernel
        backend = make_backend(gpu)
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        bound, specialization, _ = bind(*arguments, **options)
        packed = kernel._pack_args(backend, options, bound, specialization, None)
        made = triton.compile(
            ASTSource(kernel, *packed[1:]), target=gpu, options=packed[0].__dict__
        )
        print(self.target, self.case, *describe(made.asm), flush=True)


def describe(asm) -> tuple[int, int, str, str]:
    """Registers, spills, and the bytes of the loads and of the stores, as "16,16,4"."""
    if "cubin" not in asm:
        text = asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", text)[1])
        spills = len(re.findall(r"scratch_(?:load|store)", text))
        kinds = [
            [BYTES.get(w, 2) for w in re.findall(rf"(?:global|buffer)_{kind}_(\w+)", text)]
            for kind in ("load", "store")
        ]
        return registers, spills, *(",".join(map(str, sorted(k, reverse=True))) for k in kinds)
    text = asm["ptx"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-res-usage", "-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage.stdout + usage.stderr)[1])
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass.stdout))
    kinds = []
    for kind in ("LDG", "STG"):
        found = re.findall(rf"\b{kind}\.E(\S*)", sass.stdout)
        sizes = [next((n // 8 for n in (128, 64, 16) if str(n) in name), 4) for name in found]
        kinds.append(",".join(map(str, sorted(sizes, reverse=True))))
    return registers, spills, *kinds


def main() -> None:
    kernel = fake.fake_quantize
    x = torch.empty(TOKENS, WIDTH, dtype=torch.bfloat16)
    for target in sys.argv[1:]:
        for case, (formats, before) in CASES.items():
            fake.fake_quantize = Compiler(kernel, target, case)
            fake.launch(x, [(fmt, torch.empty_like(x)) for fmt in formats], before)


if __name__ == "__main__":
    main()
