"""Records: a damaged one is refused when it is read, or every table can be made from it."""

from __future__ import annotations

import copy
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.results.record import from_json, load_record, to_json
from loraq.results.tables.tables import render_tables
from loraq.utils.assets import CHECKOUT
from tests.fuzz.conftest import REFUSED

pytestmark = pytest.mark.fuzz
FOLDERS = ("demo", "ablation_error_source")
TEXTS = [
    (CHECKOUT / "results" / folder / "records" / "svdquant.json").read_text(encoding="utf-8")
    for folder in FOLDERS
]
PLAIN = [json.loads(text) for text in TEXTS]
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**30), {"float": "nan"}, {"float": "inf"}, "\ud800", "a|b\n"])
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2)
    ),
    max_leaves=4,
)
FOUND = {
    "a value in words": (("metrics", "psnr", "value"), "x"),
    "a number without a float": (("metrics", "psnr", "lo"), 10**400),
    "another count": (("images", "names"), ["x"]),
    "a list": (("metrics",), []),
    "a part of limits": (("analyses",), {"limits": {"gaussian": 1.0}}),
    "half a character": (("label",), "\ud800"),
    "bytes that are true": (("budget", "nbytes"), True),
    "a split without its size": (("metrics", "psnr", "seen"), {"value": 1.0}),
    "no layer": (("layers",), [{"weight_error": 0.1}]),
}
"""Damage that an earlier version read, or failed on in a table."""


def places(value, place=()):
    """The place of every value in a record; of a long list, the first and the last item."""
    yield place
    if isinstance(value, dict):
        for name, item in value.items():
            yield from places(item, (*place, name))
    elif isinstance(value, list) and value:
        for number in {0, len(value) - 1}:
            yield from places(value[number], (*place, number))


PLACES = [
    [place for place in places(plain) if place[:1] != ("config",) and place] for plain in PLAIN
]


def check(attempt, text):
    def tables():
        record = from_json(text)
        base = load_record(CHECKOUT / "results" / FOLDERS[0] / "records" / "rtn.json")
        return record, render_tables([base, record], base.row)

    try:
        found = attempt(tables)
    except ValueError:  # no JSON: `load_record` says so in words
        return
    if found is not REFUSED:
        record = found[0]
        again = from_json(to_json(record))
        assert repr(again.metrics) == repr(record.metrics) and again.key == json.loads(text)["key"]
        value = json.loads(text)["metrics"].get("psnr", {}).get("value")
        if isinstance(value, float) and math.isfinite(value):
            assert record.metrics["psnr"]["value"] == value


def changed(number, place, change):
    plain = copy.deepcopy(PLAIN[number])
    target = plain
    for name in place[:-1]:
        target = target[name]
    change(target, place[-1])
    return json.dumps(plain)


@settings(max_examples=600)
@given(data=st.data(), value=VALUES, number=st.integers(0, 1))
def test_one_value_is_another(attempt, data, value, number):
    place = data.draw(st.sampled_from(PLACES[number]))
    check(attempt, changed(number, place, lambda target, name: target.__setitem__(name, value)))


@settings(max_examples=90)
@given(data=st.data(), number=st.integers(0, 1))
def test_one_value_is_missing(attempt, data, number):
    place = data.draw(st.sampled_from(PLACES[number]))
    check(attempt, changed(number, place, lambda target, name: target.__delitem__(name)))


@settings(max_examples=90)
@given(data=st.data(), piece=st.sampled_from(["", "0", '"', ",", "{", "]", "NaN", "\\", "-", "1e"]))
def test_one_character_is_another(attempt, data, piece):
    text = TEXTS[0]
    place = data.draw(st.integers(0, len(text) - 1))
    check(attempt, text[:place] + piece + text[place + 1 :])


@pytest.mark.parametrize("case", FOUND)
def test_what_was_read_once_is_refused(attempt, case):
    place, value = FOUND[case]
    check(attempt, changed(0, place, lambda target, name: target.__setitem__(name, value)))
