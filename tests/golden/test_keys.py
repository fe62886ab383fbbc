"""Every product keeps its key: a changed key makes what was made before unfindable.

A change that means to move keys says so in CHANGELOG and writes the file anew:
`python -m tests.golden.keys`.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

import pytest
import torch

from loraq.compose import load_rows
from loraq.config.validation import setting
from loraq.runner.product_keys import make_row
from loraq.utils.hashing import key
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


def test_a_key_knows_neither_class_names_nor_fields_that_a_later_release_added():
    @dataclass(frozen=True)
    class Old:
        size: int = 3

    @dataclass(frozen=True)
    class New:
        size: int = 3
        depth: int = setting(2, since="0.2")

    assert key(Old()) == key(New()) != key(New(depth=3))
    assert key({"inside": [Old()]}) == key({"inside": [New()]})


def test_every_group_of_settings_may_get_a_field_without_a_new_key():
    config = load_rows(["method=rtn", "device=cpu"])[-1]
    for field in dataclasses.fields(config):
        group = getattr(config, field.name)
        if not dataclasses.is_dataclass(group):
            continue
        later = dataclasses.make_dataclass(
            "Later", [("added", int, setting(1, since="9.9"))], bases=(type(group),), frozen=True
        )
        values = {f.name: getattr(group, f.name) for f in dataclasses.fields(group)}
        other = dataclasses.replace(config, **{field.name: later(**values)})
        assert make_row(other).keys == make_row(config).keys, field.name


def test_computing_keys_leaves_the_process_as_it_was():
    before = torch.get_num_threads()
    row = make_row(load_rows(["method=rtn", "device=cpu", f"threads={before + 1}"])[-1])
    assert row.threads == before + 1
    assert torch.get_num_threads() == before
