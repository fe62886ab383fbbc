"""Every number has a lower and an upper limit; what is outside of them is refused in words."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any

import pytest

from loraq.compose import load_rows
from loraq.config import BranchConfig, Config, FormatConfig, Recipe, RoundingConfig, TransformConfig
from loraq.config.recipe_parts import AllocationConfig
from loraq.config.run import CalibrationConfig, ExperimentRow, ModelConfig
from loraq.config.validation import Checked, check_limits, hints
from loraq.errors import LoraqError
from loraq.runner.estimate import dry_run

BASE = load_rows(["method=loraq_o2"])[1]
GROUPS: dict[str, Checked] = {
    "": BASE,
    "quant": Recipe(),
    "quant.weight": FormatConfig("int4"),
    "quant.transform": TransformConfig("fixed"),
    "quant.branch": BranchConfig("loraq", solver="adam", rank=8),
    "quant.rounding": RoundingConfig("gptq"),
    "quant.allocation": AllocationConfig(),
} | {
    entry.name: getattr(BASE, entry.name)
    for entry in dataclasses.fields(Config)
    if isinstance(getattr(BASE, entry.name), Checked) and entry.name != "quant"
}
"""Every group of settings, so that each of its numbers has an effect."""
ALSO = {"quant.branch.budget": {"rank": None}, "quant.branch.tolerance": {"solver": "alternation"}}
VALUES = (math.nan, math.inf, -math.inf, -1, 0, 0.5, 10**9, 10**400, 1e300, True, "8", [8])


def numeric(group: str) -> list[str]:
    def plain(hint: Any) -> set[Any]:
        union = typing.get_origin(hint) in (typing.Union, types.UnionType)
        return set(typing.get_args(hint)) if union else {hint}

    found = hints(type(GROUPS[group]))
    return [name for name, hint in found.items() if plain(hint) & {int, float}]


FIELDS = [(group, name) for group in GROUPS for name in numeric(group)]


def limits_of(group: str, name: str) -> typing.Mapping[str, Any]:
    fields = dataclasses.fields(GROUPS[group])
    return next(entry.metadata for entry in fields if entry.name == name)


def test_all_groups_are_listed():
    def below(schema: type) -> set[type]:
        return {schema}.union(*(below(one) for one in schema.__subclasses__()))

    ours = {s for s in below(Checked) if s.__module__.startswith("loraq.")}
    ours -= {Checked, ExperimentRow}  # a row of a file has no numbers
    assert {type(group) for group in GROUPS.values()} == ours and len(FIELDS) > 25


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=str)
def test_a_number_has_both_limits_and_is_within_them(group, name):
    limits = limits_of(group, name)
    assert {limits.get("at_least"), limits.get("above")} != {None}, "no lower limit"
    assert {limits.get("at_most"), limits.get("below")} != {None}, "no upper limit"
    for value in VALUES:
        try:
            changed = {name: value, **ALSO.get(f"{group}.{name}", {})}
            made = getattr(dataclasses.replace(GROUPS[group], **changed), name)
        except LoraqError as error:
            assert name in str(error) and len(str(error)) < 700
        else:
            assert made == value and not isinstance(value, bool | list)
            if not isinstance(made, str):  # a name of a block
                check_limits(name, made, limits)


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=str)
def test_an_override_outside_the_limits_names_setting_limit_and_remedy(group, name):
    limits, key = limits_of(group, name), f"{group}.{name}".removeprefix(".")
    over = (limits.get("at_most") or limits.get("below")) * 10
    with pytest.raises(LoraqError) as caught:
        load_rows(["method=loraq_o2", f"{key}={over}"])
    assert f"{key}={over}" in str(caught.value) and "Give" in str(caught.value)


@pytest.mark.parametrize(("group", "name"), FIELDS, ids=str)
def test_the_largest_value_is_planned_or_refused(group, name, overrides):
    limits, key = limits_of(group, name), f"{group}.{name}".removeprefix(".")
    most = limits.get("at_most") or limits["below"] * 0.99
    given = [o for o in overrides if not o.startswith(f"{key}=")]
    try:
        assert "In all about" in dry_run(["method=loraq_o2", *given, f"{key}={most}"])
    except LoraqError as error:
        assert name in str(error)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: BranchConfig("svd", rank="8"), ["rank='8'", "whole number"]),
        (lambda: BranchConfig(3), ["kind=3", "text"]),
        (lambda: TransformConfig(shift=1), ["shift=1", "true or false"]),
        (lambda: Recipe(branch="svd"), ["branch='svd'", "BranchConfig"]),
        (lambda: Recipe(skip="to_q"), ["skip='to_q'", "list"]),
        (lambda: Recipe(seed=1.5), ["seed=1.5", "whole number"]),
        (lambda: CalibrationConfig(text=None), ["text=None", "text"]),
        (lambda: ModelConfig(**{**vars(BASE.model), "call": 3}), ["call=3", "KEY: VALUE"]),
    ],
)
def test_a_value_of_another_type_is_refused_in_python_too(made, words):
    with pytest.raises(LoraqError) as caught:
        made()
    for word in words:
        assert word in str(caught.value)


def test_equal_values_of_other_types_are_the_same_setting():
    import numpy as np

    made = BranchConfig("svd", rank=np.int64(8), budget=None)
    assert repr(made) == "BranchConfig(kind='svd', rank=8, budget=None)"
    assert repr(BranchConfig("svd", budget=1)) == "BranchConfig(kind='svd', budget=1.0)"
    assert Recipe(skip=["self_q"]) == Recipe(skip=("self_q",))
