"""Intervals and verdicts: coverage and error rates at small N, pairing, Holm's correction."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from loraq.errors import LoraqError
from loraq.metrics.common.intervals import (
    SMALLEST_INTERVAL,
    SMALLEST_VERDICT,
    holm,
    interval_ends,
    mean_interval,
    mean_p_values,
    paired_difference,
    paired_p_values,
    sign_flip_p_values,
)

TRIALS = 4000
DRAWS = {
    "normal": lambda draw, shape: draw.normal(size=shape),
    "heavy tails": lambda draw, shape: draw.standard_t(4, size=shape),
    "skewed": lambda draw, shape: draw.exponential(size=shape) - 1,
}


def test_interval_matches_the_normal_one_on_normal_data():
    values = np.random.default_rng(1).normal(30, 2, size=400)
    mean, lo, hi = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(400)
    assert mean == pytest.approx(values.mean())
    assert (lo, hi) == pytest.approx((mean - half, mean + half), abs=0.02)


@pytest.mark.parametrize("n", [SMALLEST_INTERVAL, 16, 32, 128])
@pytest.mark.parametrize("kind", DRAWS)
def test_intervals_cover_the_true_mean_at_every_n(kind, n):
    """The percentile bootstrap covers 84 to 89 % at N = 8."""
    lo, hi = interval_ends(DRAWS[kind](np.random.default_rng(n), (n, TRIALS)))
    assert 0.92 <= ((lo <= 0) & (hi >= 0)).mean() <= 0.98


def test_symmetric_values_have_students_interval_and_p_value():
    values = np.concatenate([np.arange(1.0, 20), -np.arange(1.0, 20)]) + 3
    expected = stats.t.interval(0.95, 37, values.mean(), stats.sem(values))
    _, lo, hi = mean_interval(values)
    assert (lo, hi) == pytest.approx(expected, rel=1e-9)
    p_value = stats.ttest_1samp(values, 0).pvalue
    assert mean_p_values(values[:, None]) == pytest.approx([p_value], rel=1e-9)


def test_a_skewed_mean_has_the_outer_ends_of_both_intervals():
    values = np.random.default_rng(4).exponential(size=64)
    student = stats.t.interval(0.95, 63, values.mean(), stats.sem(values))
    _, lo, hi = mean_interval(values)
    assert lo == pytest.approx(student[0]) and hi > student[1] + 0.01
    for mean in (lo, hi):  # the interval holds the means that the test does not reject
        assert mean_p_values(values[:, None] - mean) == pytest.approx([0.05])


def test_few_values_have_no_interval_and_no_verdict():
    few = np.arange(1.0, SMALLEST_INTERVAL)
    assert mean_interval(few) == (few.mean(), None, None)
    assert not mean_interval(few).excludes_zero and mean_interval([*few, 9.0]).excludes_zero
    clear = np.random.default_rng(6).normal(5, 0.1, (SMALLEST_VERDICT, 2))
    assert (paired_p_values(clear[1:]) == 1).all() and (paired_p_values(clear) < 0.001).all()


def test_sign_flips_are_the_exact_permutation_test():
    draw = np.random.default_rng(7)
    values = draw.normal(0.4, 1, (9, 3))
    for n in (9, 5):
        exact = stats.permutation_test(
            (values[:n],), lambda x, axis: x.sum(axis=axis), permutation_type="samples",
            n_resamples=np.inf, axis=0,
        )  # fmt: skip
        assert sign_flip_p_values(values[:n], 10_000) == pytest.approx(exact.pvalue, abs=0.02)
    assert (sign_flip_p_values(np.zeros((9, 2)), 100) == 1).all()
    assert (sign_flip_p_values(values, 500) == sign_flip_p_values(values, 500)).all()


@pytest.mark.parametrize("rows", [1, 10, 60])
@pytest.mark.parametrize("n", [2, 8, 16, SMALLEST_VERDICT])
def test_a_family_without_differences_has_a_claim_in_at_most_one_of_twenty(n, rows):
    """Rows that could be exchanged at each prompt; the percentile bootstrap claims far more.

    Of single comparisons it calls 50 % better or worse at N = 2, 11 % at N = 8, 9 % at N = 16.
    """
    draw, families = np.random.default_rng(100 * n + rows), 3000 // rows
    values = draw.exponential(size=(n, families, rows)) ** 1.5
    values *= draw.choice([-1.0, 1.0], size=(n, families, 1))  # of all rows of a family
    p_values = paired_p_values(values.reshape(n, -1), flips=max(2000, 100 * rows))
    claims = (p_values.reshape(families, rows).min(1) <= 0.05 / rows).sum()
    assert claims / families <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / families)


@pytest.mark.parametrize("rows", [1, 60, 200])
def test_a_clear_difference_is_claimed_in_a_family_of_any_size(rows):
    values = np.random.default_rng(8).normal(0, 1, (SMALLEST_VERDICT, rows))
    values[:, 0] += 1.5
    p_values = paired_p_values(values)
    assert p_values[0] * rows <= 0.05 and (p_values[1:] * rows > 0.05).all()


def test_pairing_sees_what_two_separate_intervals_cannot():
    generator = np.random.default_rng(5)
    difficulty = generator.normal(30, 5, 64)
    a, b = difficulty + 0.5 + generator.normal(0, 0.3, 64), difficulty
    assert mean_interval(a).lo < mean_interval(b).hi  # they overlap
    difference = paired_difference(a, b)
    assert difference.excludes_zero and difference.mean == pytest.approx((a - b).mean())
    same = paired_difference(b, b)
    assert same == (0.0, 0.0, 0.0) and not same.excludes_zero
    p_values = paired_p_values(np.stack([a - b, b - b, np.ones(64)], axis=1))
    assert p_values == pytest.approx([1 / 10_001, 1, 1 / 10_001])


def test_holm_is_the_textbook_procedure():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({}) == {} and holm({"x": 0.9, "y": 0.8}) == {"x": 1.0, "y": 1.0}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mean_interval([]), "non-empty"),
        (lambda: mean_interval([1.0, float("inf")]), "1 of 2 values are not finite"),
        (lambda: paired_difference([1.0], [1.0, 2.0]), "1 values against 2"),
        (lambda: holm({"a": 1.5}), "1.5"),
    ],
)
def test_misuse_says_what_is_wrong(call, words):
    with pytest.raises(LoraqError, match=words):
        call()
