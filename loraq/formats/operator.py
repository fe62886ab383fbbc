"""fake_quantize as one operator of PyTorch, for compilers and GPUs.

torch.compile does not look into it. Inductor would otherwise fold a rounding to 16 bits, such as
that of an INT scale, with the conversion back to fp32, and so change the format. On a GPU one
Triton kernel replaces the operations of `fake.py`, and gives the same bits.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from loraq.errors import LoraqError
from loraq.formats.fake import by_operations
from loraq.formats.quantization import check_input
from loraq.formats.table import FORMATS, Format, get_format

SWITCH = "LORAQ_FUSED"
"""Environment variable; 0: a GPU computes formats by the operations of `fake.py` as well."""


def fake_quantize(x: Tensor, fmt: Format, dtype: torch.dtype = torch.float32) -> Tensor:
    """dequantize(quantize(x)), bit for bit, converted to `dtype`; x [..., I] of any float dtype.

    Detached from autograd. A block that contains NaN or Inf, or whose scale overflows, becomes NaN.
    Unlike `quantize`, it does not raise for these: a check would synchronise with the GPU.
    """
    return fake_quantize_each(x, (fmt,), dtype)[0]


def fake_quantize_each(
    x: Tensor, formats: Sequence[Format], dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """`fake_quantize` of x in one or two formats; a GPU reads x once for both."""
    check_input(x)
    x, compiling = x.detach(), torch.compiler.is_compiling()
    made, written = [], []
    for fmt in formats:
        if compiling or (x.is_cuda and fmt.family != "float"):
            made.append(torch.empty(x.shape, dtype=dtype, device=x.device))
            written.append((fmt, made[-1]))
        else:
            made.append(by_operations(x, fmt, dtype))
    if written:
        fake_quantize_into(x, written)
    return made


def check_kernel(device: str) -> None:
    """LoraqError if quantising on this device needs a kernel that cannot be compiled here."""
    x = torch.zeros(1, 32, dtype=torch.bfloat16, device=device)
    fake_quantize(x, get_format("int4"), torch.bfloat16)


def fake_quantize_into(x: Tensor, results: Sequence[tuple[Format, Tensor]]) -> None:
    """Write x in one or two formats to tensors of its shape, whose last axis is contiguous."""
    torch.ops.loraq.fake_quantize(x.detach(), *as_arguments(results))


@torch.library.custom_op("loraq::fake_quantize", mutates_args=("out", "second"))
def _operator(
    x: Tensor, first_format: str, out: Tensor, second_format: str, second: Tensor | None
) -> None:
    results = from_arguments(first_format, out, second_format, second)
    if not x.numel():
        return
    for fmt, result in launch_supported(x, results):
        result.copy_(by_operations(x, fmt, result.dtype))


def launch_supported(
    x: Tensor, results: Sequence[tuple[Format, Tensor]], **before: Any
) -> list[tuple[Format, Tensor]]:
    """Write by the kernel what it supports; the others are returned.

    At its first use of a format on a GPU, the kernel is compared with the definition.
    before: fields of `Before` (`triton/fake.py`), what happens to x before.
    """
    if not (x.is_cuda and _has_triton()) or os.environ.get(SWITCH) == "0":
        return list(results)
    from loraq.formats.triton.fake import Before, launch, supported
    from loraq.formats.triton.probe import check_agreement

    first = Before(**before)
    found = [supported(x, fmt, result.dtype, first) for fmt, result in results]
    chosen = [pair for pair, has in zip(results, found, strict=True) if has]
    if chosen:
        with _explained():
            for fmt, result in chosen:
                check_agreement(fmt, x.dtype, result.dtype, x.device)
            launch(x, chosen, first)
    return [pair for pair, has in zip(results, found, strict=True) if not has]


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """LoraqError for a kernel that cannot be compiled here: Triton needs a C compiler."""
    try:
        yield
    except (LoraqError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LoraqError(
            f"Triton cannot compile or launch the kernel that quantises on a GPU ({error}). "
            "Install a C compiler and the headers of Python (apt install gcc python3-dev), or set "
            f"{SWITCH}=0 in the environment: PyTorch's operations then quantise, but slower."
        ) from error


@cache
def _has_triton() -> bool:
    """Whether the package triton, which is available on Linux only, can be imported."""
    try:
        import loraq.formats.triton.fake  # noqa: F401
    except ImportError:
        return False
    return True


def as_arguments(
    results: Sequence[tuple[Format, Tensor]],
) -> tuple[str, Tensor, str, Tensor | None]:
    """One or two formats with their tensors as an operator takes them: it takes no dataclasses."""
    (first, out), (last, other) = results[0], results[-1]
    return _format_text(first), out, _format_text(last), other if len(results) > 1 else None


def from_arguments(
    first_format: str, out: Tensor, second_format: str, second: Tensor | None
) -> list[tuple[Format, Tensor]]:
    """The inverse of `as_arguments`."""
    results = [(_parse_format(first_format), out)]
    return results if second is None else [*results, (_parse_format(second_format), second)]


def _format_text(fmt: Format) -> str:
    return f"{fmt.name} {fmt.block} {fmt.scale} {fmt.exponent} {fmt.clip} {fmt.tensor_scale}"


@lru_cache(maxsize=256)
def _parse_format(text: str) -> Format:
    name, block, *options = text.split()
    known: tuple[Any, ...] = tuple(options)
    length = None if block == "None" else int(block)
    return Format(name, FORMATS[name].family, FORMATS[name].bits, length, *known)
