"""A run calls the modules of the ways in docs/design.md, in their order."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from loraq.results.pages.layout import WAYS
from loraq.runner.experiment import run
from tests.settings import small_run


@pytest.fixture(scope="module")
def passed(tmp_path_factory, tiny_folder, captions) -> dict[str, list[str]]:
    """Way → its modules that a run called in the order of the way."""
    found: dict[str, list[str]] = {name: [] for name in WAYS}

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        module = frame.f_globals.get("__name__", "")
        if event != "call" or not module.startswith("loraq."):
            return
        for name, way in WAYS.items():
            wanted = way[len(found[name])] if len(found[name]) < len(way) else None
            if module == f"loraq.{wanted}".replace("/", "."):
                found[name].append(str(wanted))

    settings = small_run(tiny_folder, captions, tmp_path_factory.mktemp("outputs"))
    sys.setprofile(note)
    try:
        run(["method=loraq_o2", *settings], progress=False)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", WAYS)
def test_a_run_passes_the_modules_of_a_way_in_order(name, passed):
    assert passed[name] == list(WAYS[name])
