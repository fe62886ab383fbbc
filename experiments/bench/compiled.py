"""Compile the launches of a layer for GPUs that need not be present, and count instructions.

A launch compiles with the hints that a real one has: the alignment of pointers and which integers
are divisible by 16 or equal to 1. Not under TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from loraq.formats import Format, quantize
from loraq.layers.tensors import LayerTensors
from loraq.layers.triton import launches as launching
from loraq.layers.triton import operands, prepare, support

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm89": GPUTarget("cuda", 89, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "sm120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
MX = ("sm100", "sm120", "gfx950")
LARGE_MEMORY = ("sm90", "sm100")
KERNELS = ("quantize_input", "down", "linear")

TENSOR = re.compile(r"(I|H|Q|O|UTC\w*)MMA|IGMMA|HGMMA|QGMMA|v_mfma|v_smfma|v_wmma")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
AMD_WIDTHS = {"ubyte": 1, "sbyte": 1, "ushort": 2, "dword": 4, "dwordx2": 8, "dwordx4": 16}


@dataclass
class Loop:
    """One run through the body of an innermost loop with products, for one warp."""

    instructions: int = 0
    vector: int = 0  # AMD: instructions of the vector unit
    tensor: dict[str, int] = field(default_factory=dict)
    loads: dict[str, int] = field(default_factory=dict)  # "16 bytes" → loads of global memory
    barriers: int = 0
    conversions: int = 0  # int32 to fp32


@dataclass
class Kernel:
    """A compiled launch: its resources, its loops and its instructions outside of them."""

    name: str
    arguments: dict[str, Any]
    warps: int
    registers: int
    spills: int  # instructions that use local memory
    shared_bytes: int
    loops: list[Loop]
    outside: int

    def record(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        found = asdict(self)
        del found["arguments"]
        return found


def compile_layer(
    formats: dict[str, Format | None],
    shape: tuple[int, int, int],
    tokens: int,
    target: str,
    kernels: Iterable[str] = KERNELS,
) -> list[Kernel]:
    """The kernels of one layer; shape: outputs, inputs and rank (0: no branch).

    formats: `weight`, `activation`, `branch_weight`, `branch_activation`.
    """
    outputs, width, rank = shape
    weight, stored = formats["weight"], formats["branch_weight"]
    assert weight is not None and formats["activation"] is not None
    tensors = LayerTensors(
        quantize(torch.ones(outputs, width), weight),
        formats["activation"],
        left=quantize(torch.ones(outputs, rank), stored) if stored and rank else None,
        right=quantize(torch.ones(rank, width), stored) if stored and rank else None,
        branch_activation=formats["branch_activation"] if rank else None,
        bias_O=torch.ones(outputs),
    )
    with captured(target) as made:
        layer = prepare(tensors, torch.float16, torch.device("cpu"))
        layer.multiply(layer.quantize(torch.empty(tokens, width, dtype=torch.float16)))
    return [compile_launch(*launch, target) for launch in made if launch[0].__name__ in kernels]


@contextmanager
def captured(target: str) -> Iterator[list[tuple[Any, tuple[Any, ...], dict[str, Any]]]]:
    """Launches are listed instead of run, and the device answers as `target` would."""
    launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    class Launch:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, _grid: Any) -> Any:
            return lambda *arguments, **options: launches.append((self.kernel, arguments, options))

    replaced = {name: Launch(getattr(launching, name)) for name in KERNELS}
    with (
        patch.multiple(launching, **replaced, has_large_memory=lambda _: target in LARGE_MEMORY),
        patch.object(operands, "multiplies_mx", lambda _: target in MX),
        patch.object(support, "INTERPRETED", True),  # nothing runs: no GPU is needed
    ):
        yield launches


def compile_launch(
    kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], target: str
) -> Kernel:
    """Compile one launch as Triton does, and count its instructions."""
    gpu = TARGETS[target]
    backend = make_backend(gpu)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(*arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(
        backend, options, bound, specialization, None
    )
    source = ASTSource(kernel, signature, constants, attributes)
    made = triton.compile(source, target=gpu, options=parsed.__dict__)
    lines, registers = _sass(made.asm["cubin"]) if "cubin" in made.asm else _amd(made.asm["amdgcn"])
    loops = _loops(lines)
    inside = {place for start, end in loops for place in range(start, end + 1)}
    local = ("LDL", "STL", "scratch_load", "scratch_store")
    return Kernel(
        kernel.__name__,
        bound,
        made.metadata.num_warps,
        registers,
        sum(line.startswith(local) for line, _ in lines),
        made.metadata.shared,
        [_count([line for line, _ in lines[start : end + 1]]) for start, end in loops],
        len(lines) - len(inside),
    )


Lines = list[tuple[str, int | None]]
"""Instructions, each with the index of the instruction that it may jump to."""


def _sass(cubin: bytes) -> tuple[Lines, int]:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text, usage = (
            subprocess.run([binary, option, file.name], capture_output=True, text=True, check=True)
            for option in ("-sass", "-res-usage")
        )
    pattern = r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);"
    found = [(int(at, 16), name, rest) for at, name, rest in re.findall(pattern, text.stdout)]
    index = {at: number for number, (at, _, _) in enumerate(found)}
    lines: Lines = []
    for _, name, rest in found:
        jump = re.search(r"0x([0-9a-f]+)", rest) if name.startswith("BRA") else None
        lines.append((name, index.get(int(jump[1], 16)) if jump else None))
    while lines and lines[-1][0] == "NOP":  # fills the last cache line
        lines.pop()
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    assert registers is not None
    return lines, int(registers[1])


def _amd(text: str) -> tuple[Lines, int]:
    labels: dict[str, int] = {}
    names: list[tuple[str, str]] = []
    for line in text.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(names)
        elif found := re.match(r"\s+((?:s|v|ds|buffer|global|scratch|flat)_\w+)\s*(\S*)", line):
            names.append((found[1], found[2]))
    lines: Lines = [(name, labels.get(rest) if "branch" in name else None) for name, rest in names]
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    assert registers is not None
    return lines, int(registers[1])


def _loops(lines: Lines) -> list[tuple[int, int]]:
    """First and last instruction of the innermost loops that multiply, in the order of the code."""
    jumps = [(to, at) for at, (_, to) in enumerate(lines) if to is not None and to <= at]
    found: list[tuple[int, int]] = []
    for start, end in sorted(jumps, key=lambda jump: jump[1] - jump[0]):
        multiplies = any(TENSOR.match(name) for name, _ in lines[start : end + 1])
        if multiplies and all(end < first or last < start for first, last in found):
            found.append((start, end))
    return sorted(found)


def _count(names: list[str]) -> Loop:
    loop = Loop(len(names), sum(n.startswith("v_") for n in names))

    def add(counts: dict[str, int], name: str) -> None:
        counts[name] = counts.get(name, 0) + 1

    for name in names:
        words = name.split(".")
        if TENSOR.match(name):
            short = ".".join(words[:3]) if name.isupper() or "." in name else name
            add(loop.tensor, short)
        elif words[0] in ("LDG", "LDGSTS"):
            add(loop.loads, f"{next((WIDTHS[word] for word in words if word in WIDTHS), 4)} bytes")
        elif found := re.match(r"(?:buffer|global)_load_(?:lds_)?(\w+)", name):
            add(loop.loads, f"{AMD_WIDTHS[found[1].split('_')[0]]} bytes")
        elif name.startswith(("BAR.", "s_barrier")):
            loop.barriers += 1
        elif name.startswith(("I2F", "v_cvt_f32_i32")):
            loop.conversions += 1
    return loop
