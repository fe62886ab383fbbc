"""The time of a compiled kernel by counting: a stated model, not a measurement.

A program's clock cycles on one multiprocessor are the largest of

    issue    instructions of its warps; NVIDIA issues four a cycle, and a vector instruction of AMD
             takes one of four units for four cycles
    tensor   multiplications, at the peak rate of their type
    L2       bytes of its operands, at the cache's rate
    convert  int32 to fp32 conversions where they have a slow unit (sm80)

if the registers and the shared memory hold two programs at once, so that one computes while another
waits. Else the instructions outside of loops are added, and inside where a loop reads the sums of
its products (tensor instructions of sm90 and sm100 run on by themselves otherwise). All
multiprocessors are busy to the end. A kernel takes at least the time of its bytes of memory.

bf16 is a product at the peak rate, or its bytes. No product reaches it: the recipe `bf16` is one
that the same compiler made, counted by the same rules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from experiments.bench.compiled import Kernel, Loop
from loraq.formats.triton.numbers import ElementConstants


@dataclass(frozen=True)
class Gpu:
    """Published peak rates, without sparsity."""

    name: str
    processors: int
    ghz: float
    bf16: float  # TFLOP/s, as the next four
    int8: float
    mxfp8: float | None
    mxfp4: float | None
    memory: float  # TB/s
    cache: float  # bytes of L2 per cycle and multiprocessor
    shared: int  # KiB per multiprocessor
    conversions: int | None = None  # per cycle, if slower than the issue

    def multiplications(self, tera: float) -> float:
        """Multiply-adds per cycle and multiprocessor."""
        return tera * 1e3 / (2 * self.processors * self.ghz)


GPUS = {
    "sm80": Gpu("A100 SXM", 108, 1.41, 312, 624, None, None, 2.04, 5120 / 108, 164, 16),
    "sm90": Gpu("H100 SXM", 132, 1.83, 989, 1979, None, None, 3.35, 5120 / 132, 228),
    # the cache rates of B200, RTX 4090 and MI355X are not published; as of H100 and MI300X
    "sm100": Gpu("B200", 148, 1.85, 2250, 4500, 4500, 9000, 8.0, 5120 / 132, 228),
    "sm89": Gpu("RTX 4090", 128, 2.52, 165, 661, None, None, 1.01, 5120 / 132, 100),
    "gfx942": Gpu("MI300X", 304, 2.1, 1307, 2615, None, None, 5.3, 2048 / 38, 64),
    "gfx950": Gpu("MI355X", 256, 2.4, 2500, 5000, 5000, 10000, 8.0, 2048 / 38, 160),
}


ASYNCHRONOUS = ("sm90", "sm100")


def loop_rate(loop: Loop, gpu: Gpu) -> float:
    """Multiply-adds per cycle of a loop's tensor instructions."""
    name = next(iter(loop.tensor))
    if name.startswith(("IMMA", "IGMMA", "UTCIMMA")) or "_i8" in name:
        return gpu.multiplications(gpu.int8)
    if name.startswith("UTCO"):
        return gpu.multiplications(gpu.mxfp4 or gpu.bf16)
    if name.startswith(("UTCQ", "v_mfma_scale")):  # AMD's instruction does not name the formats
        return gpu.multiplications(gpu.mxfp8 or gpu.bf16)
    return gpu.multiplications(gpu.bf16)


def kernel_seconds(
    kernel: Kernel, gpu: Gpu, target: str, tokens: int, shape: tuple[int, int, int]
) -> float:
    """Modelled seconds of a launch for these tokens, outputs, inputs and rank."""
    outputs, width, rank = shape
    a, amd = kernel.arguments, target.startswith("gfx")
    if kernel.name == "quantize_input":  # has no loop
        programs = -(-tokens // a["R"]) * -(-width // a["C"])
    else:
        programs = -(-tokens // a["M"]) * (-(-outputs // a["N"]) if kernel.name == "linear" else 1)
    outside = kernel.outside * kernel.warps / (1 if amd else 4)
    parallel, serial = resident(kernel, gpu, amd) >= 2, 0.0
    units = dict.fromkeys(("issue", "tensor", "cache", "convert"), 0.0)
    for loop, K, (step, codes) in zip(kernel.loops, (width, rank), _steps(a), strict=False):
        steps = -(-K // step)
        issue = steps * (loop.vector if amd else loop.instructions) * kernel.warps
        tensor = steps * step * a["M"] * a["N"] / loop_rate(loop, gpu)
        units["issue"] += issue / (1 if amd else 4)
        units["tensor"] += tensor
        units["cache"] += steps * step * (a["M"] * codes[0] + a["N"] * codes[1]) / gpu.cache
        if gpu.conversions:
            units["convert"] += steps * loop.conversions * 32 * kernel.warps / gpu.conversions
        if loop.conversions or target not in ASYNCHRONOUS:
            serial += tensor
    if parallel:
        cycles = max(units["issue"] + outside, units["tensor"], units["cache"], units["convert"])
    else:
        cycles = outside + max(units["issue"] + serial, *units.values())
    computing = programs * cycles / (gpu.processors * gpu.ghz * 1e9)
    return max(computing, _moved(kernel, tokens, shape) / (gpu.memory * 1e12))


def _steps(arguments: dict[str, Any]) -> list[tuple[int, tuple[float, float]]]:
    """Columns of a step and bytes per column of both operands, per loop."""
    if "MODE" not in arguments:
        return []
    weight = "weight" if "WEIGHT" in arguments else "right"
    loops = (("STEP", "x", weight), ("BRANCH_STEP", "h", "left"))

    def code_bytes(operand: str) -> float:
        return _code_bytes(arguments[operand.upper()], arguments[f"{operand}_ptr"])

    return [
        (arguments[step], (code_bytes(a), code_bytes(b)))
        for step, a, b in loops
        if step in arguments
    ]


def _code_bytes(element: ElementConstants | None, codes: Tensor) -> float:
    """Bytes of one code: two of 4 bits share a byte."""
    shared = codes.element_size() == 1 and element is not None and element.bits == 4
    return 0.5 if shared else codes.element_size()


def _moved(kernel: Kernel, tokens: int, shape: tuple[int, int, int]) -> float:
    """Bytes of memory that the launch reads and writes, once each."""
    outputs, width, rank = shape
    a = kernel.arguments
    if kernel.name == "quantize_input":
        written = _code_bytes(a["E"], a["codes_ptr"])
        if a["BRANCH"] is not None:
            written += _code_bytes(a["BRANCH"], a["branch_codes_ptr"])
        return tokens * width * (2 + written)
    (_, main), *branch = _steps(a)
    if kernel.name == "down":
        return tokens * width * main[0] + rank * width * main[1] + 2 * tokens * rank
    moved = tokens * width * main[0] + outputs * width * main[1] + 2 * tokens * outputs
    return moved + sum((tokens * codes[0] + outputs * codes[1]) * rank for _, codes in branch)


def resident(kernel: Kernel, gpu: Gpu, amd: bool) -> int:
    """Programs that a multiprocessor holds at once."""
    registers = -(-kernel.registers // 8) * 8
    if amd:  # 512 registers per lane, on four units
        by_shared = gpu.shared * 1024 // max(kernel.shared_bytes, 1)
        return min(512 // registers * 4 // kernel.warps, by_shared)
    by_registers = 65536 // (registers * kernel.warps * 32)
    return min(by_registers, gpu.shared * 1024 // (kernel.shared_bytes + 1024))


def bf16_seconds(gpu: Gpu, tokens: int, outputs: int, width: int) -> float:
    """The 16-bit layer at the peak."""
    products = 2 * tokens * outputs * width / (gpu.bf16 * 1e12)
    moved = 2 * (tokens * (width + outputs) + outputs * width)
    return max(products, moved / (gpu.memory * 1e12))
