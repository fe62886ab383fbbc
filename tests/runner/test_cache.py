"""`loraq cache`: lists, verifies and removes products, but nothing that a process uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from loraq.cli import main
from loraq.runner.store import Store
from loraq.utils.files import write_bytes
from loraq.utils.pieces import keep_piece
from tests.damage import flip_bit

MAKING = """
import os, sys
from loraq.runner.store import Store
from loraq.utils.pieces import write_piece
store = Store(sys.argv[1])
shared, made = store.share("images", "shared", {}), store.write("quantised", "made", resume=True)
with shared as images, made as layers:
    for folder in (images, layers):
        write_piece(folder / "a", bytes(10))
    print(flush=True)
    sys.stdin.readline()
    if len(sys.argv) > 2:
        os._exit(1)
"""


def started(*arguments) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", MAKING, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    return process


def refused(*command) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["cache", *map(str, command)])
    assert caught.value.code == 2


def test_what_a_process_makes_is_not_removed(tmp_path, capsys):
    """Neither a folder that processes share nor one that a process fills alone."""
    remove = ("cache", "--output", str(tmp_path), "--remove", "partial", "--yes")
    partials = [tmp_path / "images/shared.partial", tmp_path / "quantised/made.partial"]
    process = started(tmp_path)
    main(remove)
    assert capsys.readouterr().out.count("in use") == 2
    assert all(keep_piece(folder / "a") for folder in partials)
    process.communicate("\n")
    store = Store(tmp_path)
    assert store.finished("images", "shared") and store.finished("quantised", "made")
    assert not list(tmp_path.glob("*/*.lock"))


def test_what_a_dead_process_left_is_removed_with_its_locks_after_a_question(tmp_path, capsys):
    remove = ("--output", tmp_path, "--remove", "partial")
    started(tmp_path, "die").communicate("\n")
    assert len(list(tmp_path.glob("*/*.lock"))) == 2
    refused(*remove)
    said = capsys.readouterr()
    assert "made" in said.out and "shared" in said.out and "MB to remove" in said.out
    assert "Nothing was removed. Add --yes" in said.err
    assert len(list(tmp_path.glob("*/*.partial/a"))) == 2
    main(["cache", *map(str, remove), "--yes"])
    assert "2 partial products and" in capsys.readouterr().out
    assert not [path for path in tmp_path.glob("*/*")]


def test_verifying_names_the_damaged_file_and_changes_nothing(tmp_path, capsys):
    """A run may be reading the product."""
    store = Store(tmp_path)
    for name in ("good", "bad"):
        with store.write("images", name) as folder:
            write_bytes(folder / "a.png", b"12345")
    flip_bit(tmp_path / "images" / "bad" / "a.png", 2)
    main(["cache", "--output", str(tmp_path), "--verify"])
    lines = capsys.readouterr().out.splitlines()
    assert "corrupted" in lines[0] and "a.png does not match its sha256" in lines[0]
    assert "finished" in lines[1] and (tmp_path / "images" / "bad" / "a.png").is_file()
    main(["cache", "--output", str(tmp_path), "--verify", "--remove", "corrupted", "--yes"])
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["good"]


@pytest.mark.parametrize("options", [["--yes"], ["--verify", "--remove", "partial"]])
def test_options_without_effect_are_refused(tmp_path, options):
    refused("--output", tmp_path, *options)
