"""Intervals: coverage on data of known mean, pairing, seeds, Holm's published behaviour."""

from __future__ import annotations

import numpy as np
import pytest

from loraq.errors import LoraqError
from loraq.metrics.common.bootstrap import bootstrap_interval, holm, paired_difference, paired_test


def test_interval_matches_the_normal_one_on_normal_data():
    values = np.random.default_rng(1).normal(30, 2, size=400)
    mean, lo, hi = bootstrap_interval(values, samples=5000)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx((mean - half, mean + half), abs=0.02)


def test_interval_covers_the_true_mean_about_95_times_of_100():
    generator = np.random.default_rng(2)
    inside = 0
    for trial in range(300):
        interval = bootstrap_interval(generator.exponential(1.0, 100), samples=500, seed=trial)
        inside += interval.lo <= 1.0 <= interval.hi
    assert 0.90 <= inside / 300 <= 0.985


def test_same_seed_same_interval_and_large_n_is_chunked_alike():
    values = list(np.random.default_rng(3).random(50))
    assert bootstrap_interval(values, seed=7) == bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) != bootstrap_interval(values, seed=8)
    large = np.random.default_rng(4).random(9000)
    interval = bootstrap_interval(large, samples=1000)
    assert interval.lo < large.mean() < interval.hi


def test_one_value_has_no_interval():
    assert bootstrap_interval([3.0]) == (3.0, None, None)
    assert not bootstrap_interval([3.0]).excludes_zero


def test_pairing_sees_what_two_separate_intervals_cannot():
    generator = np.random.default_rng(5)
    difficulty = generator.normal(30, 5, 64)
    a, b = difficulty + 0.5 + generator.normal(0, 0.3, 64), difficulty
    assert bootstrap_interval(a).lo < bootstrap_interval(b).hi  # they overlap
    difference = paired_difference(a, b)
    assert difference.excludes_zero and difference.mean == pytest.approx((a - b).mean())
    tested, p_value = paired_test(a, b)
    assert tested == difference and p_value == pytest.approx(2 / 2001)
    same, p_same = paired_test(b, b)
    assert same == (0.0, 0.0, 0.0) and not same.excludes_zero and p_same == 1.0


def test_holm_is_the_textbook_procedure():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {} and holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: bootstrap_interval([]), "non-empty"),
        (lambda: bootstrap_interval([1.0, float("inf")]), "1 of 2 values are not finite"),
        (lambda: bootstrap_interval([1.0, 2.0], samples=10), "samples = 10"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 values against 2"),
        (lambda: holm({"a": 1.5}), "1.5"),
    ],
)
def test_misuse_says_what_is_wrong(call, words):
    with pytest.raises(LoraqError, match=words):
        call()
