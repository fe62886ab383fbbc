"""The configuration: every option composes, every mistake names key, value and remedy."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from loraq.compose import CONF, load_rows, recipe
from loraq.config import BranchConfig, Config, FormatConfig, TransformConfig, validation
from loraq.config.convert import from_plain
from loraq.config.overrides import config_groups
from loraq.errors import LoraqError
from loraq.utils.user_module import modules_defining


@pytest.mark.parametrize("experiment", config_groups()["experiment"])
def test_every_experiment_composes_with_unique_rows(experiment):
    rows = load_rows([f"experiment={experiment}"])
    assert rows[0].quant is None
    assert all(row.quant is not None for row in rows[1:])
    assert len({row.row for row in rows}) == len(rows)
    assert rows[0].baseline is None or rows[0].baseline in {row.row for row in rows}


@pytest.mark.parametrize("name", ["int4", "nvfp4"])
def test_the_recipe_for_engines_has_nothing_that_their_readers_cannot_do(name):
    formats = [f"format@quant.{operand}={name}" for operand in ("weight", "activation")]
    made = recipe("loraq_export", *formats)
    assert not (made.needs_calibration or made.branch.share_qkv)
    assert (made.transform.hadamard, made.transform.shift) == (0, False)
    found = {operand: fmt.name for operand, fmt in made.formats().items()}
    assert found == {
        **dict.fromkeys(("weight", "activation"), name),
        **dict.fromkeys(("branch_weight", "branch_activation"), "fp16"),
    }


def test_the_last_of_repeated_settings_counts():
    counts = ["data.count=8", "data.count=16", "data.count=8"]
    assert load_rows(["method=rtn", *counts])[1].data.count == 8


def test_table1_is_the_comparison_that_was_asked_for():
    rows = load_rows(["experiment=table1"])
    assert len(rows) >= 25 and rows[0].data.count == 128
    branches = [row.quant.branch for row in rows[1:] if row.quant.branch.kind != "none"]
    assert {(branch.budget, branch.rank) for branch in branches} == {(0.64, None)}


@pytest.mark.parametrize("name", config_groups()["format"])
def test_every_format_mounts_at_every_operand(name):
    from loraq.formats import get_format

    operands = ("weight", "activation", "branch_weight", "branch_activation")
    mounted = [f"format@quant.{operand}={name}" for operand in operands]
    recipe = load_rows(["method=loraq_o2", *mounted])[1].quant
    for operand in operands:
        assert getattr(recipe, operand).build() == get_format(name)


@pytest.mark.parametrize("name", config_groups()["method"])
def test_every_method_is_named_by_its_file(name):
    assert load_rows([f"method={name}"])[-1].method == name


@pytest.mark.parametrize("name", sorted({*config_groups()["model"]} - {"hub"}))
def test_every_model_is_named_by_its_file(name):
    assert load_rows([f"model={name}"])[-1].model.name == name


def test_svdquant_keeps_a_16_bit_branch_unless_told_otherwise():
    assert load_rows(["method=svdquant"])[1].quant.branch_weight.name == "fp16"
    row = load_rows(["method=svdquant", "format@quant.branch_weight=int4"])[1]
    assert row.quant.branch_weight.name == "int4"
    assert row.quant.branch_activation.name == "fp16"


def test_overrides_reach_the_rows_where_they_mean_something():
    rows = load_rows(["experiment=demo", "quant.branch.budget=0.32", "quant.weight.block=32"])
    budgets = {row.row: row.quant.branch.budget for row in rows[1:]}
    assert budgets.pop("rtn") == 0.64
    assert set(budgets.values()) == {0.32}
    assert {row.quant.weight.block for row in rows[1:]} == {32}


@pytest.mark.parametrize("name", config_groups()["transform"])
@pytest.mark.parametrize("method", ["loraq_best", "rtn", "svdquant"])
def test_a_transform_replaces_the_methods_rotation_and_shift_alone(method, name):
    own = load_rows([f"method={method}"])[1].quant
    given = load_rows([f"method={method}", f"transform={name}"])[1].quant
    hadamard, _, shift = name.removeprefix("hadamard").partition("_")
    wanted = TransformConfig(
        smooth=own.transform.smooth,
        hadamard=int(hadamard) if hadamard.isdigit() else 0,
        shift="shift" in (hadamard, shift),
    )
    assert given == replace(own, transform=wanted)


def test_a_value_wins_over_a_transform_and_a_transform_over_an_experiment():
    rotated = load_rows(["method=svdquant", "transform=shift", "quant.transform.hadamard=32"])
    assert rotated[1].quant.transform == TransformConfig("search", 32, True)
    rows = load_rows(["experiment=demo", "transform=hadamard512"])
    assert {row.quant.transform.hadamard for row in rows[1:]} == {512}
    assert rows[0].quant is None


@pytest.mark.parametrize("experiment", config_groups()["experiment"])
def test_no_experiment_sets_a_transform_for_all_rows(experiment):
    written = yaml.safe_load((CONF / "experiment" / f"{experiment}.yaml").read_text())
    assert "quant" not in written
    for row in written.get("rows", []):
        assert not any(
            "transform.shift" in o or "transform.hadamard" in o for o in row["overrides"]
        )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["method=svdqant"], ["method=svdqant", "svdquant"]),
        (["model=tiny_pixrt"], ["model=tiny_pixrt", "tiny_pixart"]),
        (["format@quant.weight=itn4"], ["format@quant.weight=itn4", "int4"]),
        (["format@quant.wieght=int4"], ["format@quant.weight"]),
        (["metrics.names=[psnr,lpisp]"], ["metrics.names", "lpisp", "lpips"]),
        (["experiment=tabel1"], ["table1"]),
        (["transform=null"], ["transform=null", "Leave it out", "hadamard64"]),
        (["transform=hadamrd64"], ["transform=hadamrd64", "hadamard64"]),
        (["method=reference", "transform=shift"], ["transform=shift", "no effect"]),
        (["transform=shift", "format@quant.activation=int8"], ["shift=true", "int8"]),
        (["data.cuont=3"], ["data.cuont=3", "data.count"]),
        (["quant.branch.rnk=3"], ["quant.branch.rnk=3", "quant.branch.rank"]),
        (["+model.stepz=3"], ["model.stepz", "steps"]),
        (["data.count=many"], ["data.count", "many", "whole number"]),
        (["data.count=2.5"], ["data.count", "whole number"]),
        (["quant.weight.block=0"], ["quant.weight.block=0", "limit", "Give"]),
        (["quant.weight.block=-3"], ["quant.weight.block=-3"]),
        (["quant.weight.exponent=ceil"], ["quant.weight", "exponent"]),
        (["quant.branch.rank=0"], ["quant.branch.rank=0", "limit 1"]),
        (["quant.branch.budget=-1"], ["quant.branch.budget=-1", "above 0"]),
        (["quant.branch.budget=null"], ["rank", "budget"]),
        (["quant.branch.kind=svdd"], ["quant.branch.kind", "svd"]),
        (["quant.transform.hadamard=48"], ["quant.transform.hadamard=48", "power of two"]),
        (["quant.transform.migration=0.7"], ["migration=0.7", "only with fixed"]),
        (["quant.rounding.damp=0.1"], ["damp=0.1", "gptq"]),
        (["quant.allocation.sensitivity=activations"], ["sensitivity", "rank"]),
        (["method=rtn", "quant.allocation.kind=rank"], ["allocation.kind=rank", "no low-rank"]),
        (["method=rtn", "quant.branch.rank=4"], ["quant.branch.rank=4", "no effect"]),
        (["method=rtn", "quant.requantize_intermediate=false"], ["intermediate", "no effect"]),
        (["method=loraq_o2", "quant.branch.kind=none"], ["kind=none", "method=rtn"]),
        (["method=loraq_o2", "quant.branch.learning_rate=0.5"], ["learning_rate", "solver=adam"]),
        (["method=svdquant", "quant.branch.tolerance=0.5"], ["tolerance", "select=weight"]),
        (
            [
                "method=loraq_o2",
                "quant.branch.solver=adam",
                "quant.branch.start=zero",
                "quant.branch.split=0.9",
            ],
            ["split=0.9", "start=weight"],
        ),
        (
            ["method=loraq_o2", "quant.branch.rank=8", "quant.branch.budget=0.32"],
            ["budget=0.32", "rank=null"],
        ),
        (
            ["method=loraq_o2", "quant.allocation.kind=bits", "format@quant.activation=int8"],
            ["activations int8", "int4"],
        ),
        (["method=gptq", "format@quant.weight=bf16"], ["gptq", "bf16"]),
        (["quant.transform.hadamard=1"], ["hadamard=1", "power of two"]),
        (["method=reference", "quant.seed=1"], ["quant.seed=1", "no effect"]),
        (["experiment=demo", "method=rtn"], ["method=rtn", "experiment=demo"]),
        (["method=rtn,lqer"], ["method=rtn,lqer", "--multirun"]),
        (["just a word"], ["KEY=VALUE"]),
        (["model.path=null"], ["path", "hub_id"]),
        (["device=tpu"], ["device", "tpu", "cuda"]),
        (["metrics.bootstrap=5"], ["metrics.bootstrap=5", "100"]),
    ],
)
def test_a_mistake_names_key_value_and_remedy(overrides, words):
    with pytest.raises(LoraqError) as caught:
        load_rows(overrides)
    for word in words:
        assert word in str(caught.value)


def test_numbers_are_never_cut_or_guessed():
    with pytest.raises(LoraqError, match="whole number"):
        from_plain(BranchConfig, {"rank": 3.0}, "quant.branch")
    with pytest.raises(LoraqError, match="true or false"):
        from_plain(TransformConfig, {"shift": 1}, "quant.transform")
    assert from_plain(BranchConfig, {"budget": 1}, "quant.branch").budget == 1.0
    with pytest.raises(LoraqError, match=r"model.*must be given"):
        from_plain(Config, {"method": "rtn", "quant": None})
    assert from_plain(FormatConfig, {"name": "int8", "block": "channel"}).block == "channel"


def test_kinds_are_the_modules_that_define_them():
    assert set(modules_defining("branches", "find")) == {"alternating", "loraq", "svd"}
    assert set(modules_defining("rounding", "round_weights")) == {"gptq", "nearest"}
    with pytest.raises(LoraqError, match=r"quant\.rounding\.kind.*nearest"):
        load_rows(["method=rtn", "quant.rounding.kind=neerest"])


def test_a_module_added_to_a_package_is_a_kind_and_may_read_every_setting(monkeypatch):
    monkeypatch.setattr(validation, "modules_defining", lambda *_: ("greedy",))
    made = BranchConfig(kind="greedy", rank=4, steps=7, rotation="random", learning_rate=0.5)
    assert (made.kind, made.steps) == ("greedy", 7)
    with pytest.raises(LoraqError, match="steps=7 has no effect"):
        BranchConfig(kind="svd", rank=4, steps=7)
