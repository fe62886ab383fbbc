"""What a computation asks of a device, counted without one: operations, bytes, launches, memory.

    with torch.device("meta"): model, x = …
    with Counted() as counted: model(x)
    counted.work.seconds(rates)

Runs on meta tensors, which hold no values, so that a model of any size is counted in a second.
Every operation that reads or writes memory is one kernel; it takes the longest of its launch, its
arithmetic and its traffic. Attention is one kernel, as in PyTorch's fused implementations.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from loraq.utils.rates import Rates

ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::detach", "aten::_unsafe_view", "aten::lift")
"""Operations that launch nothing; views are recognised by their schema."""


@dataclass(frozen=True)
class Kernel:
    """One launch: its name, arithmetic operations, bytes read and written."""

    name: str
    flops: int
    bytes: int

    def seconds(self, rates: Rates) -> float:
        """The longest of launch, arithmetic and traffic."""
        return max(rates.launch, self.flops / rates.flops, self.bytes / rates.bandwidth)


@dataclass(frozen=True)
class Work:
    """How often each kernel runs. Sums, differences and multiples are those of repeated work."""

    kernels: Counter[Kernel] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return self.plus(other, 1)

    def __mul__(self, times: int) -> Work:
        return Work(Counter({kernel: times * count for kernel, count in self.kernels.items()}))

    def plus(self, other: Work, times: int) -> Work:
        """This work and `times` the other; a negative number takes work away."""
        found = Counter(self.kernels)
        for kernel, count in other.kernels.items():
            found[kernel] += times * count
        return Work(Counter({kernel: count for kernel, count in found.items() if count}))

    @property
    def flops(self) -> int:
        """Arithmetic operations of all products; a multiply-add counts as two."""
        return sum(kernel.flops * count for kernel, count in self.kernels.items())

    @property
    def bytes(self) -> int:
        """Bytes read and written by all kernels."""
        return sum(kernel.bytes * count for kernel, count in self.kernels.items())

    @property
    def launches(self) -> int:
        """The number of kernels."""
        return self.kernels.total()

    def seconds(self, rates: Rates) -> float:
        """Seconds on a device, one kernel after the other."""
        return sum(kernel.seconds(rates) * count for kernel, count in self.kernels.items())

    def __repr__(self) -> str:
        return (
            f"Work({self.flops / 1e12:.3g} TFLOP, {self.bytes / 1e9:.3g} GB, "
            f"{self.launches} launches)"
        )


class Counted(TorchDispatchMode):
    """Counts the work inside the block, and the peak of the memory that it allocates.

    peak: bytes of the tensors that were made inside the block and alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()
        self.peak = 0
        self._held = 0
        self._known: set[int] = set()
        self._attention = _Attention(self)

    def __enter__(self) -> Self:
        self._attention.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._attention.__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _tensors((args, kwargs))
        for tensor in inputs:
            self._keep(tensor, new=False)
        result = func(*args, **kwargs)
        outputs = _tensors(result)
        for tensor in outputs:
            self._keep(tensor, new=True)
        if not _launches_nothing(func):
            count = flop_registry.get(func.overloadpacket)
            flops = int(count(*args, **kwargs, out_val=result)) if count else 0
            read = _tensors(_without_targets(func, args, kwargs))
            self.add(func.overloadpacket._qualified_op_name, flops, (*read, *outputs))
        return result

    def add(self, name: str, flops: int, tensors: Iterable[Tensor]) -> None:
        """Count one kernel that reads or writes `tensors`."""
        self.work.kernels[Kernel(name, flops, sum(map(_traffic, tensors)))] += 1

    def _keep(self, tensor: Tensor, new: bool) -> None:
        """Count a storage as held until it is freed; one from outside the block is not counted."""
        storage: Any = tensor.untyped_storage()
        if id(storage) in self._known:
            return
        size = storage.nbytes() if new else 0
        self._known.add(id(storage))
        self._held += size
        self.peak = max(self.peak, self._held)
        weakref.finalize(storage, self._free, id(storage), size)

    def _free(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self._held -= size


class _Attention(TorchFunctionMode):
    """Replaces attention by one kernel: on meta tensors PyTorch would take it apart."""

    def __init__(self, counted: Counted) -> None:
        super().__init__()
        self.counted = counted

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        names = ("query", "key", "value")
        named: dict[str, Any] = dict(zip(names, args, strict=False)) | (kwargs or {})
        q, k, v = (named[name] for name in names)
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        flops = 2 * math.prod(q.shape[:-1]) * k.shape[-2] * (q.shape[-1] + v.shape[-1])
        self.counted.add("attention", flops, (q, k, v, out))
        return out


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def _without_targets(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that are read; `out=` and the target of a copy are only written."""
    given = zip(func._schema.arguments, args, strict=False)
    read = [value for argument, value in given if not argument.is_out]
    named = [value for name, value in kwargs.items() if not name.startswith("out")]
    overwrites = func.overloadpacket is torch.ops.aten.copy_
    return [read[1:] if overwrites else read, named]


def _traffic(tensor: Tensor) -> int:
    """Bytes of a tensor; of an expanded one, those that it holds."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _launches_nothing(func: Any) -> bool:
    name = func.overloadpacket._qualified_op_name
    views = any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )
    return views or name.startswith(ALLOCATIONS)
