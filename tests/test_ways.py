"""A run calls the modules of the ways in docs/design.md, in their order."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import pytest

from loraq.results.pages.layout import WAYS
from loraq.runner.experiment import run


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

    settings = [
        "method=loraq_o2",
        f"model.path={tiny_folder}",
        "model.height=64",
        "model.width=64",
        "model.steps=2",
        "model.max_sequence_length=8",
        f"data.captions={captions}",
        "data.count=2",
        "data.real=null",
        "metrics.names=[psnr]",
        "metrics.bootstrap=100",
        "generate.batch_size=2",
        "calibration.measure_prompts=2",
        "tracking=disabled",
        "calibration.prompts=2",
        "device=cpu",
        f"output={tmp_path_factory.mktemp('outputs')}",
    ]
    sys.setprofile(note)
    try:
        run(settings, progress=False)
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("name", WAYS)
def test_a_run_passes_the_modules_of_a_way_in_order(name, passed):
    assert passed[name] == list(WAYS[name])
