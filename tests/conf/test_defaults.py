"""conf/ and the dataclasses have the same defaults, whichever way a configuration is made."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from loraq import config
from loraq.compose import CONF, load_rows
from loraq.config import BranchConfig, Config, FormatConfig, ModelConfig, Recipe
from loraq.config.composition import Composer
from loraq.config.convert import from_plain
from loraq.config.overrides import config_groups
from loraq.config.validation import choices
from loraq.errors import LoraqError
from loraq.utils.plain import to_plain


def defaults(schema):
    """A dataclass's own defaults as plain data, without the fields that have none."""
    fields = dataclasses.fields(schema)
    made = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    made |= {
        f.name: f.default_factory() for f in fields if f.default_factory is not dataclasses.MISSING
    }
    return to_plain(made)


def written(name):
    return yaml.safe_load((CONF / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def primary():
    """config.yaml itself, without what its groups add."""
    return {
        name: value
        for name, value in written("config").items()
        if name not in ("defaults", "hydra")
    }


def test_settings_of_a_run_have_the_same_defaults(primary):
    own = defaults(Config)
    data, metrics, tracking = own.pop("data"), own.pop("metrics"), own.pop("tracking")
    assert primary.pop("quant").keys() == defaults(Recipe).keys()
    assert primary == own
    assert metrics == written("metrics/default")
    assert tracking == written("tracking/offline")
    # real images belong to one set of prompts: they are no default of data that is made by hand
    embedded = {"real": "asset:real_features.safetensors", "domain": "emoji"}
    assert data | embedded == written("data/captions")
    assert data["real"] is None


def test_settings_of_a_recipe_have_the_same_defaults(primary):
    own, quant = defaults(Recipe), primary["quant"]
    for operand in ("weight", "activation", "branch_weight", "branch_activation"):
        choice = next(
            entry[f"format@quant.{operand}"]
            for entry in written("config")["defaults"]
            if f"format@quant.{operand}" in entry
        )
        quant[operand] = quant[operand] | written(f"format/{choice}")
    assert quant == own


def test_without_a_method_the_default_recipe_is_composed():
    """Of all settings config.yaml's method adds but those that its file names."""
    composer = Composer(CONF)
    composed = composer.compose([])["quant"]
    named = written("method/loraq_o2")["quant"]
    assert named.keys() == {"branch"}
    expected = to_plain(Recipe())
    expected["branch"] |= named["branch"]
    assert to_plain(from_plain(Recipe, composed)) == expected


@pytest.mark.parametrize("group", ["data", "metrics", "tracking"])
def test_every_choice_of_a_group_gives_every_setting(group):
    """Nothing is left to a dataclass's default, which a reader of conf/ would not see."""
    names = {entry.name for entry in dataclasses.fields(type(getattr(Config, group)))}
    for choice in config_groups()[group]:
        assert written(f"{group}/{choice}").keys() == names, choice


@pytest.mark.parametrize("choice", config_groups()["model"])
def test_every_model_gives_every_setting(choice):
    names = {entry.name for entry in dataclasses.fields(ModelConfig)}
    assert written(f"model/{choice}").keys() - {"defaults"} == names


def test_a_model_has_no_settings_of_another_ones():
    with pytest.raises(LoraqError, match=r"model: .*steps, guidance.* must be given"):
        from_plain(ModelConfig, {"name": "mine", "family": "sana", "path": "mine"}, "model")


def test_a_repr_shows_what_differs_from_the_defaults():
    assert repr(Recipe()) == "Recipe()"
    made = Recipe(
        weight=FormatConfig("mxint4"), branch=BranchConfig("svd", rank=8), skip=("self_q",)
    )
    assert repr(made) == (
        "Recipe(weight=FormatConfig(name='mxint4'), branch=BranchConfig(kind='svd', rank=8), "
        "skip=('self_q',))"
    )


@pytest.mark.parametrize("method", ["loraq_best", "svdquant"])
def test_a_repr_is_python(method):
    row = load_rows([f"method={method}"])[-1]
    assert eval(repr(row), vars(config)) == row


def test_choices_are_those_of_the_annotations():
    assert choices(BranchConfig)["kind"] == ("none", "svd", "alternating", "loraq")
    assert choices(ModelConfig) == {"dtype": ("float32", "bfloat16", "float16")}
    with pytest.raises(
        LoraqError, match=r"select: Unknown select 'wieght'\. Did you mean 'weight'"
    ):
        BranchConfig("alternating", select="wieght")
