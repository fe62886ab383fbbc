"""Every number of decibels in the pages' sentences comes from committed records."""

from __future__ import annotations

import functools
import json
import re

import pytest
import yaml

from loraq.results.committed import read_results
from loraq.results.pages import refresh
from loraq.utils.assets import CHECKOUT

ROOT = CHECKOUT
CLAIMS = yaml.safe_load((ROOT / "tests" / "docs" / "claims.yaml").read_text(encoding="utf-8"))
PAGES = [path.relative_to(ROOT).as_posix() for path in refresh.documentation_pages(ROOT)]
PROSE = [*PAGES, *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("notebooks/*.ipynb"))]
HISTORY = "experiments/LOG.md"  # dated entries; their records may be gone


def sentences(name: str) -> str:
    """A page's text without generated blocks, in one line."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    return re.sub(r"\s+", " ", refresh.BLOCK.sub("", text))


@functools.cache
def row_values(experiment: str, metric: str) -> dict[str, float]:
    records = read_results(experiment.replace("*", "-tiny_sana")).records
    return {r.row: r.metrics[metric]["value"] for r in records if metric in r.metrics}


def source_values(source: str) -> list[float]:
    """The values that a source of `tests/docs/claims.yaml` stands for."""
    lower = source.startswith("LPIPS% ")
    found = []
    for part in source.removeprefix("LPIPS% ").split(";"):
        experiment, _, rows = part.partition(":")
        values = row_values(experiment.strip(), "lpips" if lower else "psnr")
        for pair in rows.split(","):
            row, _, base = (name.strip() for name in pair.partition(" - "))
            if lower:
                found.append(100 * (1 - values[row] / values[base]))
            else:
                found.append(values[row] - (values[base] if base else 0))
    return found


def stated(source: str, number: str) -> str:
    """The number as the records have it, in the form of `number`: "1.2" or "1.1 to 1.3"."""
    values, digits = source_values(source), len(number.split()[0].partition(".")[2])
    ends = (min(values), max(values)) if " to " in number else values
    return " to ".join(f"{value:.{digits}f}" for value in ends)


DECIBELS = re.compile(
    r"\b(?:\d[\d.]*|one|two|three|four|five|six|half|third|quarter|tenths?|few)"
    r"(?: \S+){0,3}? (?:dB|decibels?)\b.{0,20}"
)
CASES = [(page, c["says"], *c["from"]) for page, claims in CLAIMS.items() for c in claims]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[1][:40])
def test_numbers_in_sentences_are_those_of_the_records(case):
    page, quoted, *sources = case
    assert re.sub(r"[{}]", "", quoted) in sentences(page), "the page no longer has this sentence"
    numbers = re.findall(r"\{(.*?)\}", quoted)
    assert numbers == [stated(source, n) for source, n in zip(sources, numbers, strict=True)]


@pytest.mark.parametrize("name", [name for name in PROSE if name != HISTORY])
def test_every_number_of_decibels_has_a_record(name):
    """A number before "dB" or "decibel", also in words, is in a quoted sentence."""
    text = sentences(name)
    for _, quoted, *_ in filter(lambda case: case[0] == name, CASES):
        text = text.replace(re.sub(r"[{}]", "", quoted), "")
    assert DECIBELS.findall(text) == []


@pytest.mark.parametrize("name", PAGES)
def test_no_page_speaks_about_records_that_are_missing(name):
    """Except for the tables of a GPU, which nobody here has."""
    text = (ROOT / name).read_text(encoding="utf-8")
    text = refresh.BLOCK.sub(lambda block: "" if block["kind"] == "gpu" else block[0], text)
    assert "Not yet measured" not in text
