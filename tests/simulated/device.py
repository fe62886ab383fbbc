"""The context in which `torch.cuda` describes a device that is not there."""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._pytree import tree_map

from loraq.models import plain_layers
from tests.simulated.backward import run_backward
from tests.simulated.counts import Counts, place
from tests.simulated.tensors import CudaGenerator, Mode, SimulatedTensor

GIB = 1 << 30


@dataclass
class SimulatedDevice(Counts):
    """The device that `torch.cuda` describes, and counts of what was done with it.

    capability: (major, minor); count: of devices, all equal, though tensors are on the first only;
    current: the index of the current one; memory, free: bytes.
    """

    name: str = "NVIDIA H100 80GB HBM3"
    capability: tuple[int, int] = (9, 0)
    count: int = 1
    current: int = 0
    memory: int = 80 * GIB
    free: int = 70 * GIB
    multiprocessors: int = 132

    @property
    def properties(self) -> SimpleNamespace:
        """As `torch.cuda.get_device_properties`."""
        major, minor = self.capability
        return SimpleNamespace(
            name=self.name,
            major=major,
            minor=minor,
            total_memory=self.memory,
            multi_processor_count=self.multiprocessors,
            warp_size=32,
        )

    def wait(self, kind: str) -> None:
        """Count a wait of the host."""
        self.waits[kind, place()] += 1

    def functions(self) -> dict[str, Any]:
        """What `torch.cuda` answers, by the name in it."""
        return {
            "_lazy_init": lambda: None,
            "is_available": lambda: True,
            "device_count": lambda: self.count,
            "current_device": lambda: self.current,
            "current_stream": lambda device: SimpleNamespace(device=torch.device(device)),
            "set_device": lambda device: None,
            "synchronize": lambda device=None: self.wait("synchronize"),
            "empty_cache": lambda: None,
            "manual_seed": lambda seed: None,
            "manual_seed_all": lambda seed: None,
            "memory_allocated": lambda device=None: 0,
            "memory_reserved": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "max_memory_reserved": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "mem_get_info": lambda device=None: (self.free, self.memory),
            "get_device_capability": lambda device=None: self.capability,
            "get_device_name": lambda device=None: self.name,
            "get_device_properties": lambda device=None: self.properties,
            "is_bf16_supported": lambda including_emulation=True: self.capability >= (8, 0),
            "Event": functools.partial(Event, self),
        }


class Event:
    """A `torch.cuda.Event`; the device is always done."""

    def __init__(self, device: SimulatedDevice, *_: Any, **__: Any) -> None:
        self.device, self.time, self.index = device, 0.0, 0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()
        self.index = self.device.current if stream is None else stream.device.index

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        # not for the device, which may have work after the event
        self.device.wait("event" if self.index == 0 else f"event of cuda:{self.index}")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds between two events."""
        return 1000 * (end.time - self.time)


class _AnyGenerator(type):
    real = torch.Generator

    def __call__(cls, device: Any = "cpu") -> torch.Generator:
        return CudaGenerator() if torch.device(device).type == "cuda" else cls.real()

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.real)


class _Generator(metaclass=_AnyGenerator):
    """`torch.Generator`, which makes one for either device."""


@contextlib.contextmanager
def simulated_cuda(**description: Any) -> Iterator[SimulatedDevice]:
    """A block with one CUDA device, which `description` (fields of `SimulatedDevice`) describes.

    Tensors made in the block may be read after it. Caches of the library are emptied at both ends.
    """
    device = SimulatedDevice(**description)
    torch._C._ensureCUDADeviceGuardSet()
    before = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for name, function in device.functions().items():
            stack.enter_context(patch.object(torch.cuda, name, function))
        stack.enter_context(patch.object(torch, "Generator", _Generator))
        stack.enter_context(patch.object(torch, "load", functools.partial(_load, torch.load)))
        stack.enter_context(patch.object(plain_layers, "type", _plain_type, create=True))
        backward = functools.partial(run_backward, torch.autograd._engine_run_backward)
        stack.enter_context(patch.object(torch.autograd, "_engine_run_backward", backward))
        replacing = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # in `Module.to`
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, replacing)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device=) copies as others do
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        _empty_caches()
        stack.callback(_empty_caches)
        stack.enter_context(Mode(device))
        yield device


def _load(real: Any, file: Any, map_location: Any = None, **options: Any) -> Any:
    """`torch.load`, which reads storages straight onto a device."""
    there = isinstance(map_location, (str, torch.device)) and "cuda" in str(map_location)
    found = real(file, map_location="cpu" if there else map_location, **options)
    return tree_map(lambda x: x.to("cuda") if isinstance(x, torch.Tensor) else x, found) if (
        there
    ) else found  # fmt: skip


def _plain_type(x: Any) -> type:
    """The class that the check of plain layers sees: a GPU's tensors have no class of their own."""
    return torch.Tensor if isinstance(x, SimulatedTensor) else type(x)


def _empty_caches() -> None:
    """Forget what the library keeps between calls, such as matrices by device."""
    for name, module in list(sys.modules.items()):
        if name == "loraq" or name.startswith("loraq."):
            for value in list(vars(module).values()):
                if isinstance(value, functools._lru_cache_wrapper):
                    value.cache_clear()


__all__ = ["SimulatedDevice", "SimulatedTensor", "simulated_cuda"]
