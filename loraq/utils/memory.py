"""Memory as a process really holds it: anonymous pages, their peak, and what is free."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

INTERVAL = 0.005
SLACK = 192 << 20
"""Free memory that an allocator may keep: less would be faulted in again and again."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's <malloc.h>


def anonymous_bytes(pid: int | None = None) -> int:
    """RssAnon of a process (pages of mapped files do not count); 0 once it is gone.

    Where there is no /proc, the resident size.
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
    """How many blocks share one heap now: the allocator is the process's, not a thread's."""

    lock = threading.Lock()
    blocks = 0


@contextlib.contextmanager
def reused_heap() -> Iterator[Callable[[], None]]:
    """Large tensors share one heap while the block runs; call what it yields between two steps.

    glibc maps each of 32 MiB or more anew, and a third of an alternation's time is page faults; and
    of a heap it keeps what is freed below small blocks that stay: gigabytes. What is yielded hands
    free pages back once they may have grown by SLACK. Nothing happens without glibc.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if not (hasattr(libc, "mallopt") and hasattr(libc, "malloc_trim")):
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
            if not _Reuse.blocks:  # what glibc itself comes to after a large block was freed
                libc.mallopt(M_MMAP_MAX, 1 << 16)
                libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
                libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
                libc.malloc_trim(0)


def release_free_pages() -> None:
    """Give free pages back now, where a heap is shared: before tensors of quite other sizes."""
    if _Reuse.blocks:
        ctypes.CDLL(None).malloc_trim(0)


def held_bytes(device: str) -> int:
    """What this process holds on the device now."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    return anonymous_bytes()


class Peak:
    """The most that was held; final when `peak` ends."""

    top = 0


@contextlib.contextmanager
def peak(device: str) -> Iterator[Peak]:
    """The most memory that this process holds on the device while the block runs.

    On a CPU it is sampled, and counts what the allocator keeps for later: compare peaks with what
    was held before the first of them.
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


def free_bytes(device: str) -> int:
    """What can still be allocated on the device without swapping."""
    if device == "cuda":
        import torch

        kept: Any = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + kept)
    import psutil

    return int(psutil.virtual_memory().available)
