"""CITATION.cff: required fields, and agreement with pyproject.toml."""

from __future__ import annotations

import tomllib

import yaml

import loraq
from loraq.utils.assets import CHECKOUT as ROOT

CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_it_has_the_required_fields():
    """Citation File Format 1.2.0: the fields that are required, of the file and of a reference."""
    assert CITATION["cff-version"] == "1.2.0" and CITATION["type"] == "software"
    for entry in (CITATION, *CITATION["references"]):
        assert entry["title"] and [author["name"] for author in entry["authors"]]
    assert CITATION["message"] and isinstance(CITATION["version"], str)
    for reference in CITATION["references"]:
        assert reference["type"] == "article"
        for identifier in reference["identifiers"]:
            assert identifier["type"] in ("doi", "url", "swh", "other") and identifier["value"]
    assert all(isinstance(word, str) for word in CITATION["keywords"])


def test_version_and_licence_are_the_packages():
    assert CITATION["version"] == PROJECT["version"] == loraq.__version__
    assert CITATION["license"] == PROJECT["license"]


def test_the_paper_is_the_one_that_the_pages_name():
    (paper,) = CITATION["references"]
    number = paper["identifiers"][0]["value"].removeprefix("arXiv:")
    assert paper["url"].endswith(number)
    assert f"arXiv {number}" in (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
