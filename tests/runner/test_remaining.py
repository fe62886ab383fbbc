"""The time that is left: each product counts once and is looked at once, in any number of rows."""

from __future__ import annotations

import dataclasses
import os

import pytest

from loraq.compose import load_rows
from loraq.runner import estimate
from loraq.runner.estimate import Remaining
from loraq.runner.product_keys import make_row
from loraq.runner.rows import REFERENCE, Stage
from loraq.runner.store import Store
from loraq.utils.manifest import read_manifest

SHARED = (REFERENCE, Stage.EMBEDDINGS, Stage.MEASURING_INPUTS)


@pytest.fixture
def rows(monkeypatch):
    """Twenty rows that share the embeddings and the inputs, with everything to make.

    Without measured times, every product takes 100 s.
    """
    monkeypatch.setattr(estimate, "forecast", lambda row, stage, rates: (100.0, 0.0))
    row = make_row(load_rows(["method=rtn", "device=cpu", "data.count=4"])[-1])
    stages = frozenset(row.stages)

    def key(name, number):
        return row.keys[name] if name in SHARED else f"{number:04d}{row.keys[name][4:]}"

    keys = [{name: key(name, number) for name in row.keys} for number in range(20)]
    return [dataclasses.replace(row, keys=own, todo=stages) for own in keys]


def finish(store, row, stage, seconds):
    info = {"kind": row.kind(stage), "units": 4, "seconds": 4.0 * seconds}
    with store.write(*row.product(stage), info) as folder:
        (folder / "file").write_text("")


def test_every_product_counts_once_and_measured_times_replace_modelled_ones(rows, tmp_path):
    store = Store(tmp_path)
    remaining = Remaining(rows, store)
    own = len(rows[0].todo) - 2
    assert remaining.seconds(0) == 100 * (20 * own + 2)
    finish(store, rows[0], Stage.IMAGES, 0.5)  # a second each time for four images
    assert remaining.seconds(1) == 19 * (100 * (own - 1) + 4 * 0.5)
    finish(store, rows[1], Stage.IMAGES, 1.5)
    assert remaining.seconds(2) == 18 * (100 * (own - 1) + 4 * 1.0)
    assert remaining.seconds(19) == 100 * (own - 1) + 4 * 1.0
    assert remaining.seconds(20) == 0


def test_folders_and_manifests_are_read_once_for_all_rows(rows, tmp_path, monkeypatch):
    store, listed, read = Store(tmp_path), [], []
    for row in rows:
        earlier = dataclasses.replace(row, keys={s: f"e{k}" for s, k in row.keys.items()})
        finish(store, earlier, Stage.IMAGES, 1.0)
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: listed.append(str(path)) or listdir(path))
    counted = lambda path: read.append(path) or read_manifest(path)  # noqa: E731
    monkeypatch.setattr("loraq.runner.store.read_manifest", counted)
    store = Store(tmp_path)
    remaining = Remaining(rows, store)
    for number in range(len(rows)):
        remaining.seconds(number)
    under = [path for path in listed if path.startswith(str(tmp_path))]
    assert len(under) == len({stage.folder for stage in rows[0].todo})
    assert len(read) == len(rows)
