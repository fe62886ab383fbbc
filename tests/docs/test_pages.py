"""The documentation agrees with the code: numbers, names, links, commands, counts."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import yaml

from loraq.cli import COMMANDS
from loraq.config.overrides import config_groups
from loraq.results.pages import refresh
from loraq.utils.assets import CHECKOUT

ROOT = CHECKOUT
PAGES = [*refresh.documentation_pages(ROOT), *sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
MARKDOWN = [name for name in TEXTS if name.endswith(".md")]


def first_cells(text: str, heading: str) -> list[str]:
    """The first cells of the table whose heading row begins with `heading`, without backquotes."""
    lines = text.split(f"\n| {heading} |", 1)[1].splitlines()[2:]
    rows = [line for line in lines[: lines.index("")] if line.startswith("|")]
    return [row.split("|")[1].strip().strip("`") for row in rows]


LINK = re.compile(r"(?:\]\(|<img src=\")([^)\"\s]+)[)\"]")
FENCED = re.compile(r"^```.*?^```", re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What a link can point to: a heading's words in small letters, with dashes."""
    text = FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", MARKDOWN)
def test_links_and_paths_lead_somewhere(name):
    text = re.sub(r"<!--.*?-->", "", TEXTS[name], flags=re.DOTALL)
    folder = (ROOT / name).parent
    links = [link.partition("#") for link in LINK.findall(text) if "://" not in link]
    missing = [path for path, _, _ in links if path and not (folder / path).exists()]
    for path, _, anchor in links:
        page = (folder / path).resolve() if path else ROOT / name
        if anchor and page.suffix == ".md" and page.exists() and anchor not in anchors(page):
            missing.append(f"{path}#{anchor}")
    named = re.findall(r"`((?:loraq|conf|tests|docs|experiments|\.ci)/[\w./]+\.\w+)`", text)
    missing += [path for path in named if "NAME" not in path and not known(path)]
    assert not missing


def test_a_page_has_the_anchors_of_its_headings(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# What *is* `x`, then?\n\n```sh\n# no heading\n```\n\n## At full-size\n")
    assert anchors(page) == {"what-is-x-then", "at-full-size"}


def test_the_index_leads_to_every_page():
    listed = {(ROOT / "docs" / link).resolve() for link in LINK.findall(TEXTS["docs/index.md"])}
    pages = {*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md")} - {ROOT / "docs" / "index.md"}
    assert {path.name for path in pages - listed} == set()


def known(path: str) -> bool:
    invented = ("METHOD", "FAMILY", "MODEL")
    return (ROOT / path).exists() or any(word in path for word in invented)


def test_every_metric_is_defined():
    from loraq.metrics.registry import metric_names

    assert [
        name for name in metric_names() if f" `{name}` |" not in TEXTS["docs/protocol.md"]
    ] == []


def test_the_python_example_samples_as_the_configuration_does():
    model = yaml.safe_load((ROOT / "conf" / "model" / "tiny_pixart.yaml").read_text())
    example = TEXTS["README.md"].split("```python")[1].split("```")[0]
    assert f"num_inference_steps={model['steps']}," in example
    assert f"guidance_scale={model['guidance']})" in example
    assert f"max_sequence_length={model['max_sequence_length']}," in example
    assert f"height={model['height']}, width={model['width']}," in example


@pytest.mark.parametrize("page", ["README.md", "docs/method.md"])
def test_every_method_is_listed(page):
    assert sorted(first_cells(TEXTS[page], "`method=`")) == config_groups()["method"]


def test_every_experiment_is_listed():
    listed = first_cells(TEXTS["experiments/README.md"], "experiment")
    assert [name for name in listed if not name.startswith("[")] == config_groups()["experiment"]


@pytest.mark.parametrize("experiment", config_groups()["experiment"])
def test_the_number_of_rows_is_stated(experiment):
    written = yaml.safe_load(TEXTS[f"conf/experiment/{experiment}.yaml"])
    if "rows" not in written:  # another experiment's
        written = yaml.safe_load(TEXTS[f"conf/experiment/{written['defaults'][0]}.yaml"])
    lines = TEXTS["experiments/README.md"].splitlines()
    line = next(line for line in lines if line.startswith(f"| `{experiment}`"))
    assert f"; {len(written['rows'])} rows" in line


def test_every_command_is_listed():
    listed = first_cells(TEXTS["README.md"], "command")
    assert listed == [f"loraq {name}" for name in COMMANDS]


def test_the_ranks_that_the_budget_buys():
    from loraq.formats import get_format
    from loraq.quantization.budget import rank_for_budget

    table = TEXTS["docs/method.md"].split("| branch format |")[1].split("\n\n")[0]
    rows = [[cell.strip(" `") for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert len(rows) == 6
    for name, *ranks in rows:
        bought = [
            rank_for_budget(blocks * unit_shapes(width), 0.64, get_format(name))
            for width, blocks in ((1152, 28), (384, 6))
        ]
        assert bought == [int(rank) for rank in ranks]


def unit_shapes(width: int) -> list[tuple[int, int]]:
    """A PixArt block's quantised set: stacked q/k/v, three square layers, the feed-forward."""
    square = (width, width)
    return [(3 * width, width), square, square, square, (4 * width, width), (width, 4 * width)]


@pytest.mark.parametrize("path", sorted((ROOT / "results" / "reported").glob("*.csv")), ids=str)
def test_published_numbers_parse_and_have_a_source(path):
    rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    assert rows
    words = {"model", "dataset", "method", "format", "source"}
    for row in rows:
        assert None not in row and all(value for value in row.values())
        for column, value in row.items():
            assert column in words or value == "-" or isinstance(float(value), float)
    keys = [tuple(row.get(word) for word in sorted(words)) for row in rows]
    assert len(set(keys)) == len(keys)
    assert f"reported {path.stem} " in TEXTS["results/reported/README.md"]
