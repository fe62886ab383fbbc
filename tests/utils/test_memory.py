"""Memory that the allocator keeps goes back to the system."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

HOLES = """
import ctypes, json, resource
from loraq.utils import memory

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p

def leave_holes(count):  # 64 KiB each, below 5 KB that stay
    large = []
    for _ in range(count):
        large.append(ctypes.c_void_p(libc.malloc(1 << 16)))
        ctypes.memset(large[-1], 1, 1 << 16)
        libc.malloc(5000)
    for block in large:
        libc.free(block)

def faults(size):  # of the second of two large blocks, one after the other
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        bytearray(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

memory.SLACK = 64 << 20
found = [memory.anonymous_bytes()]
with memory.reused_heap() as give_back:
    for count in (500, 2000):
        leave_holes(count)
        found.append(memory.anonymous_bytes())
        give_back()
        found.append(memory.anonymous_bytes())
    with memory.reused_heap():
        pass  # the outer one goes on
    found.append(faults(100 << 20))
found.append(faults(100 << 20))
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is asked")
def test_free_pages_are_handed_back_once_they_are_many():
    ran = subprocess.run([sys.executable, "-c", HOLES], check=True, stdout=subprocess.PIPE)
    *sizes, reused, anew = json.loads(ran.stdout)
    before, few, few_kept, many, left = (size / 2**20 for size in sizes)
    assert before + 25 < few == few_kept  # 31 MiB are fewer than SLACK
    assert many > before + 125
    assert left < before + 20
    assert reused < 100 < 20_000 < anew  # pages of 4 KiB
