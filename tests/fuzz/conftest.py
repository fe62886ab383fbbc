"""Counts the examples of every target; `--fuzz-record FILE` writes them to a JSON file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings

from loraq.errors import LoraqError
from loraq.results.record import save_findings

COUNTS = pytest.StashKey[dict[str, Counter[str]]]()
STARTED = pytest.StashKey[float]()
REFUSED = object()
"""What a target gives for an input that it refuses in words."""

settings.register_profile(
    "fuzz",
    deadline=None,
    database=None,
    print_blob=True,
    phases=(Phase.explicit, Phase.generate),  # examples are small; shrinking takes minutes
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


def pytest_addoption(parser):
    parser.addoption("--fuzz-record", help="write the counts to this file")


def pytest_configure(config):
    config.stash[COUNTS], config.stash[STARTED] = {}, time.perf_counter()


@pytest.fixture
def attempt(request):
    """Call a function: its value, or REFUSED for a LoraqError; counts what happened."""
    target = request.module.__name__.rpartition("test_")[2]
    counts = request.config.stash[COUNTS].setdefault(target, Counter())
    found = getattr(request.module, "FOUND", {})
    counts["mended"] = len(found)

    def call(function: Callable[[], object]) -> object:
        counts["examples"] += 1
        try:
            value = function()
        except LoraqError as error:
            assert str(error).strip()
            counts["refused"] += 1
            return REFUSED
        counts["read"] += 1
        return value

    return call


def pytest_sessionfinish(session, exitstatus):
    record = session.config.getoption("--fuzz-record", default=None)
    if not record:
        return
    targets = {
        name: {key: counts[key] for key in ("examples", "read", "refused", "mended")}
        for name, counts in sorted(session.config.stash[COUNTS].items())
    }
    seconds = round(time.perf_counter() - session.config.stash[STARTED], 1)
    found = {"seconds": seconds, "failures": session.testsfailed, "targets": targets}
    save_findings(found, Path(record))
