"""Every command that the pages, `--help` and the experiments' files show runs, or at least plans.

A new line is found by itself. The commands run in a folder that holds the files that they name.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from loraq.cli import COMMANDS, EPILOGS, PLANNED, main, make_parsers, parse_arguments
from loraq.compose import CONF, load_rows
from loraq.data.sets import SETS
from loraq.layouts.targets import find_target
from loraq.metrics.common.published import choose_weights
from loraq.results.pages import refresh
from loraq.runner.sweep.jobs import plan_sweep
from loraq.utils.assets import CHECKOUT, PACKAGE
from tests.data.layouts import mjhq_folder

HISTORY = ("CHANGELOG.md", "LOG.md")
"""Pages about the past, whose commands need not run today."""
PLACEHOLDERS = {
    "model=hub model.hub_id=ORG/NAME": "model=hub model.path=little",
    "model=hub model.hub_id=OWNER/NAME": "model=hub model.path=little",
    "model=hub model.path=FOLDER": "model=hub model.path=little",
    "/data/MJHQ-30K": "outputs/mjhq",
    "MJHQ": "outputs/mjhq",
    "/data/qdiff": "outputs/qdiff.yaml",
    "QDIFF": "outputs/qdiff.yaml",
    "SDCI": "outputs/sdci",
    "FOLDER": "outputs/mjhq",
    "SET": "mjhq",
    "experiment=NAME": "experiment=demo",
    "experiment=…": "experiment=demo",
    "NAME": "demo",
    "MODEL=…": "MODEL=tiny_sana",
    "ablation_NAME": "ablation_rotation",
}
PIPELINES = {"packed_pipeline", "packed", "sdnq_pipeline", "torchao_pipeline", "another"}
PIPELINES |= {"qwen-Q4_K.gguf"}
IMAGES = {
    "MY_IMAGES", "REFERENCE_IMAGES", "my_images", "my_reference",
    "outputs/images/0123456789abcdef", "outputs/images/fedcba9876543210",
}  # fmt: skip


def shown_in(text: str, markdown: bool) -> set[str]:
    """The command lines of a page's code, or of a YAML file's comments; continuations joined."""
    text = re.sub(r"<!-- generated:.*?<!-- /generated -->", "", text, flags=re.DOTALL)
    text = re.sub(r"\\\n\s*(# )?", "", text)
    text = re.sub(r"torchrun --nproc-per-node \w+ -m loraq\.cli", "loraq", text)
    found = set(re.findall(r"`((?:loraq|make) [^`\n]+)`", text))
    if markdown:
        fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE))
        found |= set(re.findall(r"^((?:loraq|make) .*?)(?: +#.*)?$", fenced, re.MULTILINE))
        found |= set(re.findall(r"^    ((?:loraq|make) .*?)(?: +#.*)?$", text, re.MULTILINE))
    else:
        found |= set(re.findall(r"^#.*?\b(loraq [a-z][^()`\n]*=[^()`\n]*)", text, re.MULTILINE))
        found |= set(re.findall(r"^# +command: +(make \w+)", text, re.MULTILINE))
    return found


def collect() -> list[str]:
    pages = [page for page in refresh.documentation_pages(CHECKOUT) if page.name not in HISTORY]
    files = [*pages, *CONF.resolve().rglob("*.yaml")]
    found = {
        command.strip()
        for path in files
        for command in shown_in(path.read_text(encoding="utf-8"), path.suffix == ".md")
    }
    helps = "\n".join([str(make_parsers()[0].epilog), *EPILOGS.values()]).replace("\\\n", " ")
    found |= {
        re.split(r"\s{2,}(?=\w)", line)[0]
        for line in re.findall(r"(?:^  |: )(loraq [a-z].*)$", helps, re.MULTILINE)
    }
    return sorted(found)


def words_of(command: str) -> list[str]:
    """The words, with placeholders filled in; what stands in brackets is optional, and given."""
    text = re.sub(r"\[(--[^\]]*)\]", r"\1", command).removesuffix(" …")
    for name, value in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w/-]){re.escape(name)}(?![\w=])", value, text)
    return shlex.split(text)


@pytest.fixture(scope="module")
def desk(tmp_path_factory, tiny_folder) -> Path:
    """A folder with the files that the commands name."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "little").symlink_to(tiny_folder)
    shutil.copy(PACKAGE / "assets" / "captions.json", folder)
    (folder / "my_prompts.txt").write_text("red apple\nblue car\n")
    (folder / "my_branch.py").write_text("from loraq.branches.svd import find as find\n")
    mjhq_folder(folder / "outputs" / "mjhq", 200)
    return folder


@pytest.fixture
def at_the_desk(desk, monkeypatch):
    monkeypatch.chdir(desk)
    return desk


def captions_of(overrides: list[str]) -> list[str]:
    from loraq.data import data_prompts

    return [p.name for p in data_prompts(load_rows(["method=reference", *overrides])[0].data)]


def plan(overrides: list[str], command: str) -> None:
    """Plan the rows as a dry run does, if their model is in the package; else compose them."""
    if (load_rows(overrides)[0].model.path or "").startswith("asset:"):
        main([command, *overrides, "--dry-run"])


@pytest.mark.parametrize("command", [c for c in collect() if c.startswith("loraq ")])
def test_a_command_that_is_shown_runs(command, at_the_desk, capsys):
    words = words_of(command)[1:]
    if len(words) == 1:  # only the command's name, or --help
        assert words[0] in (*COMMANDS, "--help")
        return
    options = parse_arguments(words)
    if options.command in PLANNED:
        main(words) if options.cfg else plan(options.overrides, options.command)
    elif options.command in ("fit", "save"):
        assert load_rows(options.overrides)
    elif options.command == "fetch" and options.set == "weights":
        assert options.only is None or choose_weights(options.only.split(","))
    elif options.command == "fetch":
        assert SETS[options.set].hub or SETS[options.set].url
    elif options.command == "score":
        score(words, options, at_the_desk)
    elif options.command == "sweep":
        sweep(options, capsys)
    elif options.command == "export" and not options.list:
        assert options.checkpoint.parts[0] in PIPELINES and find_target(options.to)
    else:
        main(words)


def score(words, options, folder):
    if options.target.name in PIPELINES:
        there = ["model.path=little"] if "model=hub" in options.overrides else []
        assert captions_of([*options.overrides, *there])
        return
    for images in (options.target, options.against):
        assert str(images) in IMAGES, "name the folder in IMAGES"
        (folder / images).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(captions_of(options.overrides)[:2]):
            colour = (number * 90, 40, len(images.name) * 9)
            Image.new("RGB", (64, 64), colour).save(folder / images / f"{name}.png")
    main([*words, "data.count=2", "metrics.names=[psnr]", "--quiet"])


def sweep(options, capsys):
    if options.status is not None:
        _, folder = plan_sweep(["method=rtn", "data.count=2,3"])
        main(["sweep", "--status", str(folder)])
        assert "2 jobs" in capsys.readouterr().out
    elif options.again is None:
        assert plan_sweep(options.overrides)[0].jobs


@pytest.mark.parametrize("command", [c for c in collect() if c.startswith("make ")])
def test_a_target_that_is_shown_exists(command):
    done = subprocess.run(
        [*words_of(command), "--dry-run"], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_new_commands_are_found():
    page = (
        "Run `make neu` or `loraq run a=1`, and\nmake nothing up.\n```sh\nloraq run a=2   # why\n"
        "loraq sweep a=3 \\\n    b=4\n```\n    make alt\n"
    )
    assert shown_in(page, markdown=True) == {
        "make neu", "loraq run a=1", "loraq run a=2", "loraq sweep a=3 b=4", "make alt",
    }  # fmt: skip
    header = "# x\n#   command:  make neu   (or: loraq run experiment=neu)\n"
    assert {c.strip() for c in shown_in(header, markdown=False)} == {
        "make neu", "loraq run experiment=neu",
    }  # fmt: skip
