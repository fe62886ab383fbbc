"""How commands end: in words, with an exit status, and with the traceback in a file."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraq.errors import LoraqError
from loraq.utils.assets import CHECKOUT
from loraq.utils.failures import DEBUG, reporting_errors


def ended(error: BaseException) -> int:
    with pytest.raises(SystemExit) as stopped, reporting_errors():
        raise error
    return stopped.value.code


def test_an_error_is_reported_without_a_traceback(capsys):
    assert ended(LoraqError("data.count=0 is below the limit 1.")) == 2
    assert capsys.readouterr().err == "loraq: data.count=0 is below the limit 1.\n"


def test_a_fault_is_three_lines_and_a_file_with_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["loraq", "run"])
    assert ended(TypeError("'int' object is not iterable\nmore")) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "loraq: internal error: TypeError: 'int' object is not iterable"
    assert len(lines) == 3 and "report it: CONTRIBUTING.md" in lines[1]
    file = Path(re.search(r"Traceback: (\S+)", lines[2])[1])
    text = file.read_text()
    file.unlink()
    assert "Traceback (most recent call last)" in text and "TypeError" in text
    assert f"python {sys.version.split()[0]}" in text and text.startswith("loraq run\n")
    heading = (CHECKOUT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert "\n## Reporting a fault\n" in heading


@pytest.mark.parametrize("error", [LoraqError("wrong"), IsADirectoryError(21, "no", "folder")])
def test_a_variable_shows_the_traceback(error, monkeypatch, capsys):
    monkeypatch.setenv(DEBUG, "1")
    assert ended(error) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_an_interruption_is_one_line(capsys):
    stop = KeyboardInterrupt()
    assert ended(stop) == 130
    stop.add_note("while 'mine.py' was running (find())")
    assert ended(stop) == 130
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("loraq: interrupted. ") and "same command" in first
    assert second.startswith("loraq: interrupted while 'mine.py' was running (find()). ")


@pytest.mark.parametrize("kind", ["file for folder", "folder for file"])
def test_a_path_of_the_wrong_kind_is_named(kind, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped, reporting_errors():
        if kind == "folder for file":
            tmp_path.write_text("")
        (tmp_path / "file").write_text("")
        (tmp_path / "file" / "inner").mkdir()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(tmp_path) in error and "Move it, or" in error


def test_a_reader_that_has_gone_ends_the_command_in_silence():
    code = (
        "from loraq.utils.failures import reporting_errors\n"
        "with reporting_errors():\n"
        "    for _ in range(100_000): print('a line of the table')\n"
    )
    command = [sys.executable, "-c", code]
    piped = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert piped.stdout.readline() == b"a line of the table\n"
    piped.stdout.close()
    assert piped.stderr.read() == b"" and piped.wait() == 141


def test_a_broken_pipe_that_is_not_the_output_is_a_fault(capsys):
    assert ended(BrokenPipeError(32, "Broken pipe")) == 1
    error = capsys.readouterr().err
    Path(re.search(r"Traceback: (\S+)", error)[1]).unlink()
    assert "BrokenPipeError" in error
