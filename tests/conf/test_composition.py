"""What is merged here is what Hydra composes: for rows of experiments and kinds of overrides."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from loraq.compose import CONF, load_rows
from loraq.config.by_hydra import compose_with_hydra
from loraq.config.composition import Composer, NeedsHydra
from loraq.config.overrides import config_groups, expand_sweep
from loraq.errors import LoraqError


def merged(folder, overrides):
    """As `Composer.compose`, without its way out to Hydra."""
    composer = Composer(folder)
    return composer.merge([composer.parse(override) for override in overrides])


def agree(folder, overrides):
    """Both compose the same, in the same order of keys too, as records are written in it."""
    found, expected = merged(folder, overrides), compose_with_hydra(folder, overrides)
    assert json.dumps(found) == json.dumps(expected), overrides


def every_row(experiment):
    """What each row composes, by its overrides; the files are read once, as for a command."""
    composer = Composer(CONF)
    chosen = [f"experiment={experiment}"]

    def one(overrides):
        return composer.merge([composer.parse(override) for override in overrides])

    rows = [chosen, *([*chosen, *row["overrides"]] for row in one(chosen)["rows"])]
    return [(overrides, one(overrides)) for overrides in rows]


@pytest.mark.parametrize("experiment", ["ablation_outside", "protocol_small", "table1"])
def test_rows_of_experiments_compose_as_hydra_composes_them(experiment):
    """Of rows that override the same settings one: Hydra takes half a second for each."""
    kinds = {
        tuple(text.partition("=")[0] for text in overrides): (overrides, found)
        for overrides, found in every_row(experiment)
    }
    for overrides, found in kinds.values():
        assert json.dumps(found) == json.dumps(compose_with_hydra(CONF, overrides)), overrides


@pytest.mark.parametrize("method", config_groups()["method"])
def test_methods_compose_as_hydra_composes_them(method):
    agree(CONF, [f"method={method}"])


@pytest.mark.parametrize("experiment", config_groups()["experiment"])
def test_no_row_of_an_experiment_needs_hydra_itself(experiment):
    assert all(found["experiment"] == experiment for _, found in every_row(experiment))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model=tiny_sana", "data=outside", "metrics=paired", "tracking=disabled"],
        ["model=pixart_sigma"],
        ["model=sana_1_6b", "metrics=paired"],
        ["experiment=protocol", "model=sana_1_6b", "metrics.workers=2"],
        ["format@quant.weight=mxfp4_e2m1", "quant.weight.block=16"],
        ["method=svdquant", "format@quant.branch_weight=int4"],
        ["experiment=demo", "data=outside", "data.count=3", "row=rtn"],
        ["method=reference", "quant=null"],
        ["method=svdquant", "transform=hadamard64", "quant.transform.smooth=none"],
        ["experiment=table1", "method=loraq_best", "transform=none"],
        ["quant=null", "label='a, b'"],
        ["quant.skip=[]", "metrics.names=[psnr,lpips]", "metrics.analyses=[limits]"],
        [
            "quant.branch.tolerance=1e-5",
            "quant.branch.budget=null",
            "quant.requantize_intermediate=no",
        ],
        ["data.count=${generate.batch_size}", "output=${oc.env:HOME}/runs"],
        ["+model.call.extra=1", "+model.stepz=3", "+threads=2"],
        ["~model.call.clean_caption", "~model.call.use_resolution_binning=false"],
        ["data.count=3", "data.count=4", "model=tiny_sana", "model=tiny_pixart"],
    ],
    ids=" ".join,
)
def test_overrides_of_every_kind_do_what_they_do_in_hydra(overrides):
    agree(CONF, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["++model.call.extra=1"],
        ["+experiment=demo"],
        ["~tracking"],
        ["quant.transform={shift: true}"],
        ["model.call={a: 1}"],
        ["metrics.names.0=ssim"],
        ["hydra.verbose=true"],
        ["data.cuont=3"],
        ["quant=null", "quant.seed=1"],
        ["+data.count=3"],
        ["metrics.names=psnr"],
    ],
    ids=" ".join,
)
def test_what_is_rare_or_wrong_is_left_to_hydra(overrides):
    with pytest.raises(NeedsHydra):
        merged(CONF, overrides)
    try:
        expected = compose_with_hydra(CONF, overrides)
    except LoraqError as error:
        with pytest.raises(LoraqError) as caught:
            Composer(CONF).compose(overrides)
        assert str(caught.value) == str(error)
    else:
        assert Composer(CONF).compose(overrides) == expected


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(CONF.resolve(), tmp_path / "conf")


ACTS = "format@quant.activation"


@pytest.mark.parametrize(
    ("files", "overrides"),
    [
        ({"format/int4_32": "defaults: [int4]\nblock: 32\n"}, ["format@quant.weight=int4_32"]),
        ({"format/int4_32": "defaults: [int4, _self_]\nname: x\n"}, [f"{ACTS}=int4_32"]),
        ({"format/int4_32": "defaults: [_self_, int4]\nname: x\n"}, [f"{ACTS}=int4_32"]),
        ({"model/mine": "# @package data\nset: file\n"}, ["model=mine"]),
        ({"data/mine": "# @package quant.transform\nshift: true\n"}, ["data=mine"]),
        ({"data/mine": ""}, ["data=mine"]),
        (
            {"experiment/mine": f"# @package _global_\ndefaults: [override /{ACTS}: int8]\n"},
            ["experiment=mine", "method=svdquant"],
        ),
        (
            {  # an experiment's choice wins over a method's, and the command line's over both
                "experiment/mine": "# @package _global_\ndefaults:\n"
                "  - override /method: svdquant\n"
                "  - override /format@quant.branch_weight: int6\n",
            },
            ["experiment=mine", "format@quant.branch_activation=int4"],
        ),
    ],
)
def test_files_that_might_be_written_compose_as_hydra_composes_them(folder, files, overrides):
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    agree(folder, overrides)


@pytest.mark.parametrize(
    "text",
    [
        "defaults: [{/format@second: int4}]\n",
        "defaults: ['int4', {override /data: outside}, _self_, int8]\n",
        "defaults: [{optional int4: x}]\n",
        "# @package _group_._name_\nname: x\n",
        "# @other thing\nname: x\n",
        "name: '???'\nblock: [1]\nscale: {a: 1}\n",
        "- a\n- list\n",
        "name: [\n",
    ],
)
def test_files_of_other_kinds_are_left_to_hydra(folder, text):
    (folder / "format" / "mine.yaml").write_text(text)
    with pytest.raises(NeedsHydra):
        merged(folder, ["format@quant.weight=mine"])


def test_a_changed_file_is_seen_by_the_next_command(folder, monkeypatch):
    monkeypatch.setattr("loraq.compose.CONF", folder)
    assert load_rows(["metrics=paired"])[1].metrics.bootstrap == 2000
    path = folder / "metrics" / "paired.yaml"
    path.write_text(path.read_text().replace("2000", "300"))
    assert load_rows(["metrics=paired"])[1].metrics.bootstrap == 300


def test_a_group_without_a_choice_is_left_to_hydra():
    with pytest.raises(NeedsHydra):
        merged(CONF, ["experiment=null"])


def test_where_hydra_runs_with_a_folder_of_the_users_it_composes_itself(tmp_path, monkeypatch):
    """`python -m loraq.run --config-dir FOLDER`: files there add to those of conf/."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    asked = []
    monkeypatch.setattr(
        "loraq.config.composition.compose_with_hydra", lambda _, overrides: asked.append(overrides)
    )
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        Composer(CONF).compose(["method=rtn"])
        assert asked == []
        found = GlobalHydra.instance().config_loader().get_search_path()
        found.append("command-line", f"file://{tmp_path}")
        Composer(CONF).compose(["method=rtn"])
    assert asked == [["method=rtn"]]


def test_interpolations_are_resolved_and_mistaken_ones_answered():
    assert load_rows(["data.count=${generate.batch_size}"])[1].data.count == 16
    with pytest.raises(LoraqError, match="cannot be resolved"):
        load_rows(["data.count=${nothing.there}"])


def test_an_experiment_composes_in_a_second_or_two():
    code = (
        "import time, loraq.formats\n"  # torch, which takes longer than all the rest
        "started = time.process_time()\n"
        "from loraq.compose import load_rows\n"
        "assert len(load_rows(['experiment=table1'])) == 26\n"
        "spent = time.process_time() - started\n"
        "assert spent < 3, spent\n"  # 0.8 s; Hydra alone takes 9
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["a=1,2", "b=x"], [["a=1", "b=x"], ["a=2", "b=x"]]),
        (["+a=range(1,4)"], [["+a=1"], ["+a=2"], ["+a=3"]]),
        (["a=choice(x,y)", "b=1,2"], [[f"a={a}", f"b={b}"] for a in "xy" for b in (1, 2)]),
        (["tracking=glob(*)"], [[f"tracking={name}"] for name in config_groups()["tracking"]]),
        (["a='x,y'", "b=[1,2]", "~c"], [["a='x,y'", "b=[1,2]", "~c=null"]]),
        (["a=1,2", "a=3"], [["a=3"]]),
        ([], [[]]),
    ],
)
def test_a_sweep_is_every_combination(overrides, jobs):
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert expand_sweep(overrides) == jobs
    if "glob" not in str(overrides):  # as Hydra's own sweeper multiplies them out
        parsed = OverridesParser.create().parse_overrides(overrides)
        assert [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]] == jobs


def test_a_sweep_over_an_interval_is_refused():
    with pytest.raises(LoraqError, match="interval"):
        expand_sweep(["quant.branch.budget=interval(0,1)"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["quant.seed=range(0,2000)"], ["2,000 jobs", "1,000", "--yes"]),
        (["method=rtn,lqer", "quant.seed=range(0,1000)"], ["2,000 jobs (2 × 1,000)"]),
        (["quant.seed=range(0,10000000000)"], ["more than", "limit is 1,000"]),
        ([f"{key}=range(0,1000)" for key in "abc"], ["1,000,000,000 jobs"]),
    ],
)
def test_a_sweep_of_very_many_jobs_is_counted_and_asked_about(overrides, words):
    with pytest.raises(LoraqError) as caught:
        expand_sweep(overrides, 1_000)
    for word in words:
        assert word in str(caught.value)
    assert ("--yes" in str(caught.value)) == ("2,000" in words[0])


def test_a_folder_of_configurations_given_to_hydra_is_composed_by_hydra(tmp_path):
    """As `python -m loraq.run --config-path=FOLDER` initialises Hydra."""
    from hydra import initialize_config_dir

    copy = tmp_path / "conf"
    shutil.copytree(CONF.resolve(), copy)
    file = copy / "config.yaml"
    file.write_text(file.read_text(encoding="utf-8").replace("device: auto", "device: cpu"))
    with initialize_config_dir(str(copy), version_base="1.3"):
        assert Composer(CONF).compose(["method=rtn"])["device"] == "cpu"
    assert Composer(CONF).compose(["method=rtn"])["device"] == "auto"


@pytest.mark.parametrize("override", ["+=", "+=0.5", "=1", "~="])
def test_an_override_without_a_key_is_refused(override):
    with pytest.raises(LoraqError, match="is not an override"):
        load_rows([override])
