"""What decides the values that a GPU computes: its model, the libraries, and PyTorch's settings.

Two GPUs of different models, or one with different libraries, sum in different orders, and 4-bit
activations turn a last-bit difference into another image. So the keys of what a GPU computes hold
all of `gpu_arithmetic`. The settings are the same in every run (`fixed_arithmetic`).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraq.errors import LoraqError

if TYPE_CHECKING:
    import torch

SETTINGS = {
    "matmul.allow_tf32": False,
    "matmul.allow_fp16_reduced_precision_reduction": False,
    "matmul.allow_bf16_reduced_precision_reduction": False,
    "matmul.allow_fp16_accumulation": False,
    "cudnn.allow_tf32": False,
    "cudnn.benchmark": False,
    "cudnn.deterministic": True,
}
"""The same in every run: float32 products in float32, sums of 16-bit products in float32, and
convolutions that are chosen by a rule, not by measured times."""

VARIABLES = (
    "NVIDIA_TF32_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUBLASLT_WORKSPACE_SIZE",
    "DISABLE_ADDMM_CUDA_LT",
    "TORCH_BLAS_PREFER_CUBLASLT",
    "TORCH_BLAS_PREFER_HIPBLASLT",
    "PYTORCH_TUNABLEOP_ENABLED",
    "LORAQ_FUSED",
)
"""Environment variables that choose other kernels; those that are set belong to the arithmetic."""

DRIVERS = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")


def gpu_index() -> int:
    """The index of this process's GPU: LOCAL_RANK, which torchrun and accelerate launch set.

    LoraqError if there are fewer GPUs.
    """
    import torch

    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise LoraqError(
            f"LOCAL_RANK={index}: this process would use GPU {index}, and PyTorch finds {count}, "
            f"numbered from 0. Start one process for each GPU (torchrun --nproc-per-node={count}); "
            "if every process sees only a GPU of its own, unset LOCAL_RANK."
        )
    return index


def gpu_names() -> list[str]:
    """The different models among the GPUs that PyTorch finds."""
    import torch

    found = (torch.cuda.get_device_properties(n).name for n in range(torch.cuda.device_count()))
    return list(dict.fromkeys(found))


def gpu_arithmetic() -> dict[str, Any]:
    """All that decides the values which this process's GPU computes, as plain data.

    Model and number of processors (parts of a GPU differ from all of it), architecture, the power
    of two of memory that decides the size of groups, libraries, settings. Not the driver.
    """
    import torch

    gpu = torch.cuda.get_device_properties(gpu_index())
    chosen = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return {
        "name": gpu.name,
        "processors": gpu.multi_processor_count,
        "architecture": f"{gpu.major}.{gpu.minor}",
        "memory_at_least": f"{memory_at_least(gpu_index()) >> 20} MiB",
        "libraries": _libraries(),
        "settings": SETTINGS | chosen,
    }


def memory_at_least(device: torch.device | int) -> int:
    """The largest power of two of bytes in a GPU's memory: its firmware's share does not move it.

    GPUs of one name may have memories of different sizes (GeForce RTX 4060 Ti: 8 and 16 GB).
    """
    import torch

    memory: int = torch.cuda.get_device_properties(device).total_memory
    return 1 << (memory.bit_length() - 1)


def describe_gpu() -> dict[str, Any]:
    """`gpu_arithmetic` with the number of GPUs, bytes of memory, and the driver's version."""
    import torch

    return {
        **gpu_arithmetic(),
        "count": torch.cuda.device_count(),
        "memory": torch.cuda.get_device_properties(gpu_index()).total_memory,
        "driver": driver_version(),
    }


def _libraries() -> dict[str, str]:
    """Versions of CUDA or ROCm, of cuDNN or MIOpen, and of Triton; cuBLAS comes with CUDA."""
    import torch

    hip = torch.version.hip
    found = {
        "ROCm" if hip else "CUDA": hip or torch.version.cuda,
        "MIOpen" if hip else "cuDNN": torch.backends.cudnn.version(),
    }
    with contextlib.suppress(ImportError):  # its distribution has another name for ROCm
        import triton

        found["Triton"] = triton.__version__
    return {name: str(version) for name, version in found.items()}


def driver_version() -> str:
    """The version of the GPU's driver, "" if the system does not tell."""
    for path in DRIVERS:
        with contextlib.suppress(OSError):
            if found := re.search(r"\d+(\.\d+)+", path.read_text(encoding="utf-8")):
                return found[0]
    return ""


@contextlib.contextmanager
def fixed_arithmetic() -> Iterator[None]:
    """PyTorch computes with `SETTINGS` while the block runs."""
    import torch

    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    wanted: list[tuple[Any, str, object]] = []
    for name, value in SETTINGS.items():
        library, _, setting = name.partition(".")
        wanted.append((matmul if library == "matmul" else cudnn, setting, value))
    # PyTorch's second interface to TF32: "none" would follow what is set for all libraries
    wanted += [(owner, "fp32_precision", "ieee") for owner in (matmul, cudnn.conv, cudnn.rnn)]
    before = [(owner, setting, _value(owner, setting)) for owner, setting, _ in wanted]
    for place, setting, chosen in wanted:
        setattr(place, setting, chosen)
    try:
        yield
    finally:
        for place, setting, held in before:
            if held is not None:
                setattr(place, setting, held)


def _value(owner: Any, name: str) -> Any:
    """A setting; None if it was last set through PyTorch's other interface, which has it then."""
    try:
        return getattr(owner, name)
    except RuntimeError:
        return None
