"""Every product keeps its key: a changed key makes what was made before unfindable.

A change that means to move keys says so in CHANGELOG and writes the file anew:
`python -m tests.golden.keys`.
"""

from __future__ import annotations

import json

import pytest

from tests.golden import keys


@pytest.fixture(scope="module")
def found():
    return json.loads(keys.text(keys.found_keys()))


@pytest.fixture(scope="module")
def golden():
    return json.loads(keys.FILE.read_text(encoding="utf-8"))


def test_every_row_of_every_experiment_has_its_golden_keys(found, golden):
    assert list(found["experiments"]) == list(golden["experiments"])
    for experiment, rows in golden["experiments"].items():
        assert list(found["experiments"][experiment]) == list(rows), experiment
        for row, entry in rows.items():
            for part, value in entry.items():
                where = f"{part} of row '{row}' of {experiment}"
                assert found["experiments"][experiment][row][part] == value, where


def test_settings_fingerprints_and_plain_data_read_as_they_did(found, golden):
    assert found["defaults"] == golden["defaults"]
    assert found["plain"] == golden["plain"]
