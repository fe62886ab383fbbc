"""The split is disjoint and deterministic, and the committed assets agree with it."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from safetensors import safe_open

from experiments.train_tiny.settings import ASSETS, SETTINGS, Settings
from experiments.train_tiny.split import make_split

NAMES = [f"name_{i:04d}" for i in range(900)]


def test_split_ignores_order_and_repeats():
    """The same names in another order give the same split."""
    shuffled = NAMES.copy()
    random.Random(5).shuffle(shuffled)
    assert make_split(NAMES) == make_split(shuffled)


def test_split_is_disjoint():
    """Held-out names are not in the training set, and no caption is in two lists."""
    split = make_split(NAMES)
    assert not set(split.train) & {*split.held_test, *split.held_dev}
    lists = split.calibration + split.seen_dev + split.seen_test
    assert set(lists) <= set(split.train)
    used = Counter(lists + split.held_test + split.held_dev)
    assert max(used.values()) == 1


def test_split_refuses_too_few_names():
    """Too few training names are an error that says how many are needed."""
    with pytest.raises(ValueError, match="too few for captions: need 288"):
        make_split(NAMES[:400])


def test_more_subjects_keep_the_captions():
    """The caption lists do not depend on how many subjects are trained on."""
    few, many = make_split(NAMES), make_split(NAMES, Settings(train_subjects=500))
    assert (few.calibration, few.seen_test, few.held_test) == (
        many.calibration,
        many.seen_test,
        many.held_test,
    )


def captions() -> dict[str, list[dict]]:
    """The committed captions."""
    return json.loads((ASSETS / "captions.json").read_text(encoding="utf-8"))


def test_committed_captions_are_balanced_and_disjoint():
    """Sizes, unique names and prompts, and balanced prefixes of the test list."""
    lists = captions()
    sizes = {key: len(entries) for key, entries in lists.items()}
    assert sizes == {
        "calibration": SETTINGS.calibration,
        "development": 2 * SETTINGS.held_dev,
        "test": 2 * SETTINGS.held_test,
        "outside": 128,
    }
    entries = [e for part in lists.values() for e in part]
    assert max(Counter(e["name"] for e in entries).values()) == 1
    assert max(Counter(e["prompt"] for e in entries).values()) == 1
    assert all(e["name"].replace("_", "").isalnum() and e["name"].isascii() for e in entries)
    for prefix in (32, 64, 128, 256):
        assert sum(e["seen"] for e in lists["test"][:prefix]) == prefix // 2


def test_real_features_follow_the_test_list():
    """One finite feature vector per test caption, in its order."""
    with safe_open(ASSETS / "real_features.safetensors", "pt") as file:
        names = json.loads(file.metadata()["names"])
        values = file.get_tensor("features")
    assert names == [e["name"] for e in captions()["test"]]
    assert values.shape == (len(names), 1280)
    assert values.isfinite().all() and values.std(0).mean() > 0.05
