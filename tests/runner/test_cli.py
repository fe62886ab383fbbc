"""The command line: `--help` is fast, errors exit with 2 and without a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml

from loraq.cli import COMMANDS, PLANNED, main, parse_arguments
from loraq.compose import load_rows
from loraq.run import main as hydras_entry_point
from loraq.utils.plain import to_plain


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_does_not_import_torch(command):
    code = (
        "import sys, time, loraq.cli\n"
        "try: loraq.cli.main(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "assert not {'torch', 'diffusers', 'hydra', 'numpy'} & set(sys.modules)\n"
        "assert time.process_time() < 2\n"  # 0.1 s; the CPU's, as other processes may run
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "usage: loraq" in done.stdout


def test_import_loraq_does_not_import_torch():
    code = "import sys, loraq; assert not {'torch', 'diffusers', 'hydra'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_errors_exit_with_2_and_no_traceback(capsys):
    for arguments in (["run", "method=nothing"], ["run", "--dry-run", "data.cuont=1"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        error = capsys.readouterr().err
        assert error.startswith("loraq: ") and "Traceback" not in error


@pytest.mark.parametrize("option", [["--quiet"], ["--against", "there"]], ids=" ".join)
def test_overrides_stand_on_both_sides_of_an_option(option):
    options = parse_arguments(["score", "here", "data.count=1", *option, "metrics=paired"])
    assert options.overrides == ["data.count=1", "metrics=paired"]
    assert (str(options.target), options.command) == ("here", "score")
    assert parse_arguments(["score", "here", *option]).overrides == []


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["run", "--dry-run", "method=rtn", "output={file}"], "is a file, not a folder"),
        (["sweep", "method=rtn", "output={file}"], "is a file, not a folder"),
        (["score", "{folder}", "--json", "{folder}"], "is a folder, not a file"),
        (["report", "demo", "--to", "{folder}"], "is a folder, not a file"),
        (["report", "demo", "--to", "{file}/page.html"], "is a file, not a folder"),
        (["run", "--dry-run", "+model.call.clean_capton=1"], "clean_caption"),
    ],
)
def test_what_cannot_be_written_or_passed_is_refused_first(command, words, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(SystemExit) as caught:
        main([word.format(file=file, folder=tmp_path) for word in command])
    assert caught.value.code == 2 and words in capsys.readouterr().err


@pytest.mark.parametrize("value", ["${nope}", "${oc.env:NOT_SET}"])
def test_hydras_own_entry_point_leaves_interpolations_to_the_composition(
    value, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["loraq", "method=rtn", f"model.path={value}"])
    with pytest.raises(SystemExit) as caught:
        hydras_entry_point()
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert "An interpolation cannot be resolved" in error and "internal" not in error


@pytest.mark.parametrize("command", PLANNED)
def test_cfg_job_prints_every_row_as_yaml_and_stops(command, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["experiment=demo", "row=rtn", "data.count=${generate.batch_size}"]
    main([command, "--cfg", "job", *given])
    written = yaml.safe_load(capsys.readouterr().out)
    assert list(written) == ["reference", "rtn"]
    assert written["reference"]["quant"] is None
    assert written["rtn"]["data"]["count"] == "${generate.batch_size}"
    assert written["rtn"]["quant"]["skip"] is None and written["rtn"]["label"] == "RTN"
    main([command, *given, "--cfg", "job", "--resolve"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    assert resolved == {row.row: to_plain(row) for row in load_rows(given)}
    assert resolved["rtn"]["data"]["count"] == 16
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--multirun", "method=rtn,lqer"], ["--multirun", "loraq sweep"]),
        (["-m", "method=rtn,lqer"], ["-m", "loraq sweep"]),
        (["--config-name=other"], ["--config-name", "conf/"]),
        (["--config-path", "elsewhere"], ["--config-path", "conf/"]),
        (["-cd", "elsewhere"], ["-cd", "conf/"]),
        (["--cfg", "job", "--package", "quant"], ["--package", "--cfg job"]),
        (["--info", "all"], ["--info", "--cfg job"]),
        (["--hydra-help"], ["--hydra-help", "--help"]),
        (["--experimental-rerun", "job.pickle"], ["--experimental-rerun", "same command"]),
        (["--shell-completion", "install=bash"], ["--shell-completion", "--help"]),
        (["--cfg", "hydra"], ["--cfg hydra", "--cfg job"]),
        (["--cfg", "all"], ["--cfg all", "--cfg job"]),
        (["--resolve"], ["--resolve", "--cfg job"]),
        (["--cfg", "job", "--dry-run"], ["--cfg job", "--dry-run"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_other_options_of_hydra_are_refused_with_an_alternative(arguments, words, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["run", *arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("loraq: ")
    for word in words:
        assert word in error


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("loraq.results.report.write_report", None)
    monkeypatch.setattr("loraq.runner.score.score_images", None)
    for command in ["score", str(tmp_path), "--json"], ["report", "table1", "--to"]:
        with pytest.raises(SystemExit) as caught:
            main([*command, str(tmp_path)])
        assert caught.value.code == 2
        assert f"'{tmp_path}': it is a folder, not a file" in capsys.readouterr().err
