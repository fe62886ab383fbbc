"""Compile every kernel that some layers launch, for GPUs that need not be present.

python -m tests.kernels.compile_for TARGET …    (sm80 sm90 sm100 gfx942)
"""

from __future__ import annotations

import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from loraq.layers.triton import layer as launching
from loraq.layers.triton import operands, prepare, support
from tests.kernels.layers import RECIPES, random_layer

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
CHOSEN = ("int4, W4A8 branch", "int4, fp16 branch", "mxfp4, mxfp8 branch", "nvfp4")
TYPES = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.uint8: "*u8"}


class Compiler:
    """Replaces a kernel: compiles it for the arguments of a launch instead of running it."""

    def __init__(self, kernel, target: str) -> None:
        self.kernel, self.target = kernel, target

    def __getitem__(self, _grid):
        return self.launch

    def launch(self, *arguments, **options) -> None:
        signature, constants = {}, {}
        for parameter, value in zip(self.kernel.params, arguments, strict=True):
            if parameter.is_constexpr:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(fn=self.kernel, signature=signature, constexprs=constants)
        made = triton.compile(source, target=TARGETS[self.target], options=options)
        text = made.asm.get("ptx") or made.asm["amdgcn"]
        int8 = ".s8.s8" in text or "mfma_i32" in text
        print(self.target, self.kernel.__name__, "int8" if int8 else "-", flush=True)


def main() -> None:
    cpu = torch.device("cpu")
    kernels = {name: getattr(launching, name) for name in ("quantize_input", "down", "linear")}
    for target in sys.argv[1:]:
        operands.has_fp8 = lambda _device, target=target: target != "sm80"
        for name, kernel in kernels.items():
            setattr(launching, name, Compiler(kernel, target))
        for recipe in CHOSEN:
            tensors = random_layer(RECIPES[recipe], outputs=128, width=512, rank=32)
            support.INTERPRETED = True  # skips the check for a GPU; nothing runs
            layer = prepare(tensors, torch.float16, cpu)
            layer.multiply(layer.quantize(torch.randn(64, 512, dtype=torch.float16)))


if __name__ == "__main__":
    main()
