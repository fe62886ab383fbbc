"""Parts are written while the next is computed, claimed until written, and errors surface."""

from __future__ import annotations

import contextlib
import threading

import pytest

from loraq.errors import DiskFullError
from loraq.utils.parts import Part, make_parts, unfinished
from loraq.utils.pieces import write_piece


def parts_of(folder, count: int) -> list[Part]:
    return [Part(n, f"{n:05d}", [folder / f"{n:05d}.bin"]) for n in range(count)]


@contextlib.contextmanager
def noting(claimed: list[str], name: str, wait: bool):
    claimed.append(name)
    try:
        yield True
    finally:
        claimed.remove(name)


def test_a_part_is_written_while_the_next_is_computed(tmp_path):
    claimed, next_begun, order = [], threading.Event(), []

    def make(part):
        if part.number == 1:
            next_begun.set()
        order.append(f"made {part.number}, claimed {len(claimed)}")

        def write():
            if part.number == 0:
                assert next_begun.wait(20), "the next part waits for the writing of this one"
            assert part.name in claimed
            write_piece(part.files[0], bytes([part.number]))

        return write

    parts = parts_of(tmp_path, 3)
    make_parts(
        tmp_path,
        unfinished(parts),
        lambda name, wait: noting(claimed, name, wait),
        make,
        lambda part: order.append(f"done {part.number}"),
    )
    assert not claimed and not unfinished(parts)
    assert [line for line in order if line.startswith("done")] == ["done 0", "done 1", "done 2"]
    assert order[:2] == ["made 0, claimed 1", "made 1, claimed 2"]  # both at once, never three
    assert all(not line.endswith("claimed 3") for line in order)


def test_an_error_of_the_writer_ends_the_run_and_keeps_what_is_written(tmp_path):
    claimed, made = [], []

    def make(part):
        made.append(part.number)

        def write():
            if part.number >= 1:
                raise DiskFullError(f"the disk is full at {part.number}")
            write_piece(part.files[0], b"x")

        return write

    parts = parts_of(tmp_path, 6)
    with pytest.raises(DiskFullError, match=r"full at 1$"):
        make_parts(tmp_path, parts, lambda name, wait: noting(claimed, name, wait), make)
    assert not claimed and made[-1] < 5
    assert [part.number for part in unfinished(parts)] == [1, 2, 3, 4, 5]
    written = parts[0].files[0].stat().st_mtime_ns
    make_parts(
        tmp_path,
        parts,
        lambda name, wait: noting(claimed, name, wait),
        lambda part: lambda: write_piece(part.files[0], b"x") and None,
    )
    assert not unfinished(parts) and parts[0].files[0].stat().st_mtime_ns == written


def test_an_error_of_the_computation_leaves_what_was_computed_before(tmp_path):
    def make(part):
        if part.number == 2:
            raise RuntimeError("out of memory")
        return lambda: write_piece(part.files[0], b"x") and None

    parts = parts_of(tmp_path, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        make_parts(tmp_path, parts, lambda name, wait: noting([], name, wait), make)
    assert [part.number for part in unfinished(parts)] == [2, 3]
