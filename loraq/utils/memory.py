"""Memory of a process: anonymous pages, their peak, free memory, and glibc's heap settings."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INTERVAL = 0.005  # seconds between two samples of `peak`
SLACK = 192 << 20
"""Freed memory that the allocator may keep; with less, the same pages fault repeatedly."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's <malloc.h>


def anonymous_bytes(pid: int | None = None) -> int:
    """RssAnon of a process in bytes, without mapped files; 0 if the process has ended.

    On systems without /proc, the resident set size.
    """
    pid = os.getpid() if pid is None else pid
    status = Path(f"/proc/{pid}/status")
    if Path("/proc/self/status").is_file():
        try:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text())
        except OSError:
            return 0
        return 1024 * int(found[1]) if found else 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


class _Reuse:
    """The number of active `reused_heap` blocks; the settings apply to all threads."""

    lock = threading.Lock()
    blocks = 0


@contextlib.contextmanager
def reused_heap() -> Iterator[Callable[[], None]]:
    """Allocate large tensors on the heap inside the block; call the yielded function between steps.

    By default, glibc maps every allocation of 32 MiB or more separately, and page faults take a
    third of an alternation's time. A heap, in turn, keeps gigabytes of freed pages below small
    allocations. The yielded function returns freed pages to the OS (malloc_trim) if the process
    has grown by more than SLACK. Without glibc, both do nothing.
    """
    libc = _glibc()
    if libc is None:
        yield lambda: None
        return
    held = anonymous_bytes()

    def trim() -> None:
        nonlocal held
        if anonymous_bytes() > held + SLACK:
            libc.malloc_trim(0)
            held = anonymous_bytes()

    with _Reuse.lock:
        _Reuse.blocks += 1
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 30)
    try:
        yield trim
    finally:
        with _Reuse.lock:
            _Reuse.blocks -= 1
            if not _Reuse.blocks:  # glibc's values after a large block was freed
                libc.mallopt(M_MMAP_MAX, 1 << 16)
                libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
                libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
                libc.malloc_trim(0)


def release_free_pages() -> None:
    """Return freed heap pages to the OS (malloc_trim), if a `reused_heap` block is active.

    Call it before allocating tensors of very different sizes.
    """
    if _Reuse.blocks and (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def _glibc() -> ctypes.CDLL | None:
    """The C library if it has glibc's malloc functions, else None."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    return libc if hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim") else None


def held_bytes(device: str) -> int:
    """Bytes that this process has allocated on the device."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return anonymous_bytes()


class Peak:
    """The peak in bytes; final when the `peak` block ends."""

    top = 0

    def __repr__(self) -> str:
        return f"Peak({self.top / 1e9:.3f} GB)"


@contextlib.contextmanager
def peak(device: str) -> Iterator[Peak]:
    """Measure the peak memory of this process on the device inside the block.

    On a CPU it is sampled and includes freed memory that the allocator keeps; subtract
    `held_bytes` from before the first block.
    """
    found = Peak()
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        yield found
        torch.cuda.synchronize()
        found.top = torch.cuda.max_memory_allocated()
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(INTERVAL):
            found.top = max(found.top, anonymous_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        ended.set()
        watcher.join()
        found.top = max(found.top, anonymous_bytes())  # the block may be shorter than an interval


def free_bytes(device: str) -> int:
    """Bytes that can still be allocated on the device without swapping."""
    if device == "cuda":
        import torch

        kept: Any = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + kept)
    import psutil

    return int(psutil.virtual_memory().available)
