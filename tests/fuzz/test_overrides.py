"""Overrides: refused in words, or composed as Hydra composes them and converted exactly."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq.compose import load_rows
from loraq.config.by_hydra import compose_with_hydra
from loraq.config.composition import Composer
from loraq.config.overrides import config_groups
from loraq.utils.assets import CONF
from tests.fuzz.conftest import REFUSED

pytestmark = pytest.mark.fuzz
KEYS = [
    *Composer(CONF).keys,
    *config_groups(),
    *(f"format@quant.{part}" for part in ("weight", "activation", "branch_weight")),
]
# fmt: off
WORDS = [
    "0", "1", "-1", "16", "0.5", "1e3", "1e999", "nan", "inf", "null", "true", "False", "''", '""',
    "int4", "svdquant", "reference", "tiny_sana", "[]", "[1]", "[a,b]", "{}", "{a: 1}", "???",
    "${generate.seed}", "${x}", "${", "$", "a b", "é", "\u2028", "\\", "'", '"', ",", "=", "@", ":",
    "(", ")", "choice(1,2)", "range(1,3)", "int(3)", "1_000", "0x10", "010", "9" * 400, "~", "\n",
]
# fmt: on
VALUES = st.lists(st.sampled_from(WORDS) | st.text(max_size=3), min_size=0, max_size=2).map("".join)
OVERRIDES = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "", "", "", "+", "++", "~"]),
    st.sampled_from(KEYS) | st.text(max_size=4),
    st.sampled_from(["=", "=", "=", "=", "", "@x=", ".x=", "=="]),
    VALUES,
)
COMPOSER = Composer(CONF)
CHOICES = [f"{group}={name}" for group, names in COMPOSER.groups.items() for name in names]
MEANT = st.sampled_from(CHOICES) | st.builds(
    "{}={}".format,
    st.sampled_from([key for key in COMPOSER.keys if "." in key]),
    st.integers(0, 64) | st.floats(0, 1) | st.sampled_from(["null", "true", "false", "[]", "{}"]),
)
"""Overrides that a user could mean: every choice of every group, and values of the usual kinds."""
FOUND = {"no key": "+=", "no key, a number": "+=0.5"}
"""Overrides on which an earlier version failed."""


def check(attempt, overrides):
    rows = attempt(lambda: load_rows(overrides))
    if rows is REFUSED:
        return
    assert rows[-1] == load_rows(overrides)[-1]
    # the same override twice counts once, in its last place; Hydra would delete a key twice
    given = list(dict.fromkeys(override for override in reversed(overrides) if override))[::-1]
    assert Composer(CONF).compose(given) == compose_with_hydra(CONF, given)


@settings(max_examples=200)
@given(override=OVERRIDES)
def test_an_override_is_refused_or_means_what_hydra_says(attempt, override):
    check(attempt, [override])


@settings(max_examples=400)
@given(overrides=st.lists(MEANT, min_size=1, max_size=3))
def test_overrides_that_a_user_could_mean(attempt, overrides):
    check(attempt, overrides)


@settings(max_examples=200)
@given(overrides=st.lists(OVERRIDES | st.text(max_size=8), max_size=3))
def test_several_overrides(attempt, overrides):
    check(attempt, overrides)


@pytest.mark.parametrize("case", FOUND)
def test_what_failed_once_does_not_fail_again(attempt, case):
    check(attempt, [FOUND[case]])
