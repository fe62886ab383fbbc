"""Memory that the allocator keeps goes back to the system."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

HOLES = """
import ctypes, json
from loraq import memory

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

memory.SLACK = 64 << 20
trim, found = memory.trimmer(), [memory.anonymous_bytes()]
for count in (500, 2000):
    leave_holes(count)
    found.append(memory.anonymous_bytes())
    trim()
    found.append(memory.anonymous_bytes())
print(json.dumps(found))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is asked")
def test_free_pages_are_handed_back_once_they_are_many():
    ran = subprocess.run([sys.executable, "-c", HOLES], check=True, stdout=subprocess.PIPE)
    before, few, few_kept, many, left = (n / 2**20 for n in json.loads(ran.stdout))
    assert before + 25 < few == few_kept  # 31 MiB are fewer than SLACK
    assert many > before + 125
    assert left < before + 20
