"""Tensors that say cuda:0 and hold their values on the CPU, and the rules that a device has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.simulated.counts import Counts, place
from tests.simulated.operations import INDEXING, operation

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class MixedDevicesError(RuntimeError):
    """An operation on tensors of the device and of the host."""


class SimulatedTensor(Tensor):
    """A tensor on cuda:0 whose values are in `host`, a CPU tensor."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> SimulatedTensor:
        made = Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            layout=host.layout,
            device=CUDA,
        )
        made.host = host
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"SimulatedTensor({self.host!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # torch.save, pickle
        return self.detach().cpu().__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (Tensor.data_ptr, Tensor.untyped_storage):
            return func(args[0].host)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.scaled_dot_product_attention:  # asks the GPU itself
                check_mix(func, [*_leaves(args), *_leaves(kwargs.values())], ())
                return SimulatedTensor(func(*_to_host(args), **_to_host(kwargs)))
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return Mode(Counts()).__torch_dispatch__(func, types, args, kwargs)  # after the block


Generator = torch.Generator  # the class itself, which `simulated_cuda` replaces


class CudaGenerator(Generator):
    """A generator on cuda:0."""

    made: ClassVar[WeakValueDictionary[int, CudaGenerator]] = WeakValueDictionary()
    """By address, because operations see another object with the same address."""

    def __init__(self, device: Any = CUDA) -> None:
        self.made[self._cdata] = self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA


class Mode(TorchDispatchMode):
    """Runs every operation on the values, after the checks of a device; counts into `counts`."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled, and dynamo takes seconds to import

    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        flat = [*_leaves(args), *_leaves(kwargs.values())]
        held = [x for x in flat if isinstance(x, SimulatedTensor)]
        device = next((x for x in flat if isinstance(x, torch.device)), None)
        kwargs.pop("pin_memory", None)
        on_device = device.type == "cuda" if device is not None else bool(held)
        _check_generators(flat, CUDA if on_device else CPU)
        if not held and not on_device:
            return func(*args, **kwargs)
        found = operation(func)
        if held and found.composite:  # only inference mode brings them here
            with self:
                return func.decompose(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copy(func, args, kwargs, on_device)
        written = found.written(args, kwargs)
        if func in INDEXING:
            self._check_index(*args)
        else:
            check_mix(func, flat, written.values())
        if held and found.waits:
            self.counts.waits[found.name, place()] += 1
        if found.linear_algebra and any(x.dtype == torch.float64 for x in held):
            self.counts.float64[found.name, place()] += 1
        made = func(*_to_host(args), **_to_host(kwargs))
        # inference mode makes views of ordinary tensors ordinary, and all else inference tensors
        ordinary = found.view and not any(x.is_inference() for x in held)
        with torch.inference_mode(False) if ordinary else contextlib.nullcontext():
            return _returned(func, made, written, on_device)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any], on_device: bool) -> Any:
        """Copies are what may mix devices."""
        inplace = func is aten.copy_.default
        source = args[1] if inplace else args[0]
        target_there = isinstance(args[0], SimulatedTensor) if inplace else on_device
        blocking = not (kwargs.get("non_blocking") or (inplace and len(args) > 2 and args[2]))
        if isinstance(source, SimulatedTensor) and not target_there and blocking:
            self.counts.waits["copy to the host", place()] += 1
        elif target_there and not isinstance(source, SimulatedTensor):
            self.counts.copies["copy to the device", place()] += 1
        made = func(*_to_host(args), **_to_host(kwargs))
        return args[0] if inplace else SimulatedTensor(made) if target_there else made

    def _check_index(
        self, x: Tensor, indices: Sequence[Tensor | None], value: Tensor | None = None, *_: Any
    ) -> None:
        given = [index for index in indices if index is not None]
        there = isinstance(x, SimulatedTensor)
        if not there and any(isinstance(index, SimulatedTensor) for index in given):
            raise MixedDevicesError(f"a CPU tensor is indexed by a tensor on cuda:0 ({place()})")
        mixed = value is not None and isinstance(value, SimulatedTensor) != there
        if mixed and value.dim():
            raise MixedDevicesError(f"a value on {value.device} is put into {x.device} ({place()})")
        masked_fill = mixed and len(given) == 1  # a number: PyTorch fills without an index
        for index in given:
            if isinstance(index, SimulatedTensor):
                if index.dtype in (torch.bool, torch.uint8) and not masked_fill:
                    self.counts.waits["boolean index", place()] += 1
            elif there:
                self.counts.copies["index from the host", place()] += 1


def check_mix(func: Any, flat: Sequence[Any], written: Iterable[Any]) -> None:
    """MixedDevicesError if tensors of the host, other than single numbers, meet the device's."""
    plain = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, SimulatedTensor)]
    if not plain or not any(isinstance(x, SimulatedTensor) for x in flat):
        return
    results = [id(x) for x in written]
    wrong = [x for x in plain if x.dim() or id(x) in results]
    if wrong:
        shapes = ", ".join(str(tuple(x.shape)) for x in wrong)
        raise MixedDevicesError(
            f"{getattr(func, '__name__', func)}: tensors on cuda:0 and on cpu (of shape {shapes}), "
            f"at {place()}"
        )


def _check_generators(flat: Sequence[Any], device: torch.device) -> None:
    for x in flat:
        if isinstance(x, Generator):
            found = CUDA if x._cdata in CudaGenerator.made else CPU
            if found.type != device.type:
                raise MixedDevicesError(
                    f"a generator on {found.type} draws for {device.type} ({place()})"
                )


def _leaves(values: Iterable[Any]) -> Iterator[Any]:
    """The arguments, and those in lists among them."""
    for x in values:
        if isinstance(x, (list, tuple)):
            yield from _leaves(x)
        else:
            yield x


def _to_host(x: Any) -> Any:
    if isinstance(x, SimulatedTensor):
        return x.host
    if isinstance(x, (list, tuple)):
        return [_to_host(part) for part in x]
    if isinstance(x, dict):
        return {name: _to_host(part) for name, part in x.items()}
    return CPU if isinstance(x, torch.device) else x


def _to_device(x: Any) -> Any:
    if isinstance(x, (list, tuple)):
        return type(x)(map(_to_device, x))
    return SimulatedTensor(x) if isinstance(x, Tensor) else x


def _returned(func: Any, made: Any, written: Mapping[str, Any], on_device: bool) -> Any:
    """`made` on its device; what was written to is returned as the object that was given."""
    if not written:
        return _to_device(made) if on_device else made
    for given in written.values():
        if isinstance(given, SimulatedTensor) and given.shape != given.host.shape:
            raise NotImplementedError(f"{func} changes a shape in place, which is not simulated")
    if not func._schema.returns:  # an operator of our own that only writes
        return None
    several = isinstance(made, (tuple, list))
    values = []
    for value, declared in zip(made if several else (made,), func._schema.returns, strict=True):
        info = declared.alias_info
        names = info.after_set if info is not None and info.is_write else ()
        given = next((written[name] for name in names), None)
        values.append(_to_device(value) if given is None else given)
    return tuple(values) if several else values[0]
