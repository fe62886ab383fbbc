"""`experiment=protocol` at full size: the reference's ranks, types, captions; what is refused."""

from __future__ import annotations

import pytest
import torch

from experiments.bench.make_fullsize import meta_model
from loraq import recipe
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.models.family import recipe_for
from loraq.models.layers import list_layers
from loraq.quantization.budget import planned_branch_bits
from loraq.quantization.quantizer import quantize_model
from loraq.runner import experiment
from loraq.runner.plan import check_domain, report_calibration
from tests.quantization.toy import Toy, toy_layers

PROTOCOL = ["experiment=protocol", "data.captions=MJHQ", "calibration.captions=QDIFF"]


@pytest.mark.parametrize(
    ("model", "scale", "loraq_rank"), [("pixart_sigma", "fp16", 120), ("sana_1_6b", "bf16", 120)]
)
def test_rows_have_the_published_rank_or_its_memory_and_the_models_type(model, scale, loraq_rank):
    rows = {str(row.row): row for row in load_rows([*PROTOCOL, f"model={model}"])}
    family = rows["rtn"].model.family
    layers = list_layers(meta_model(model), family, rows["rtn"].quant.skip)
    planned = {
        name: planned_branch_bits(layers, row.quant) for name, row in rows.items() if row.quant
    }
    rank, published = planned["svdquant"]
    assert (rank, planned["svdquant_gptq"]) == (32, (32, published))
    assert rows["svdquant_gptq"].quant.rounding.kind == "gptq"
    for name in ("loraq_o2_w4a8", "loraq_best"):
        rank, bits = planned[name]
        assert rank >= loraq_rank and 0 <= published - bits < 0.01 * (4 + published), (name, bits)
    for name, row in rows.items():
        if row.quant is not None:
            formats = row.quant.formats()
            assert {formats[x].scale for x in ("weight", "activation")} == {scale}, name
    branch = rows["svdquant"].quant.formats()
    assert {branch[x].name for x in ("branch_weight", "branch_activation")} == {scale}
    calibration = rows["svdquant"].calibration
    assert (calibration.set, calibration.prompts, rows["svdquant"].data.count) == (
        *("qdiff", 128),
        5000,
    )


def test_budget_rank_is_the_memory_of_a_16_bit_branch_and_excludes_other_sizes():
    layers = toy_layers()
    stored = planned_branch_bits(layers, recipe("svdquant", "quant.branch.rank=4"))[1]
    given = planned_branch_bits(layers, recipe("svdquant", "quant.branch.budget_rank=4"))
    assert given == (4, stored)
    for other in ("quant.branch.rank=4", "quant.branch.budget=0.3"):
        with pytest.raises(LoraqError, match="has no effect here, only with"):
            recipe("svdquant", "quant.branch.budget_rank=4", other)
    with pytest.raises(LoraqError, match=r"budget_rank=100000 is outside 1\.\."):
        planned_branch_bits(layers, recipe("svdquant", "quant.branch.budget_rank=100000"))


def test_the_models_type_is_that_of_the_model_that_is_quantised():
    made = recipe("rtn", "quant.sixteen_bit=model")
    with pytest.raises(LoraqError, match="the model's type is not known here"):
        quantize_model(Toy(), toy_layers(), made, family="pixart_sigma")
    bfloat = recipe_for(made, "pixart_sigma", torch.bfloat16)
    assert bfloat.formats()["weight"].scale == "bf16"
    half, float32 = (recipe_for(made, "pixart_sigma", d) for d in ("float16", "float32"))
    plain = recipe_for(recipe("rtn"), "pixart_sigma", "float16")
    assert half.identity() == float32.identity() == plain.identity()
    mx = recipe("rtn", "format@quant.weight=mxfp4_e2m1", "quant.sixteen_bit=model")
    assert recipe_for(mx, "pixart_sigma", "bfloat16").formats()["weight"].scale == "e8m0"


@pytest.mark.parametrize("command", [["experiment=table1"], ["experiment=demo"], ["method=rtn"]])
def test_photographs_are_not_measured_against_emoji(command, tmp_path, monkeypatch):
    """Before the model's files are looked for: they would be downloaded."""
    asked = [*command, "model=pixart_sigma", f"output={tmp_path}"]
    monkeypatch.setattr("loraq.runner.plan.make_row", lambda _config: pytest.fail("too late"))
    with pytest.raises(LoraqError, match=r"photographs.*of emoji.*data=mjhq data\.captions=FOLDER"):
        experiment.run(asked, progress=False)
    with pytest.raises(
        LoraqError, match=r"network of alignment was trained on emoji.*names=\[psnr"
    ):
        experiment.run(
            [*asked, "data=file", "data.captions=my.txt", "metrics.names=[psnr,alignment]"],
            progress=False,
        )


def test_captions_of_ones_own_may_be_of_any_domain():
    own = ["method=rtn", "model=pixart_sigma", "data.captions=my.json"]
    with pytest.raises(LoraqError, match=r"my.json are.*of emoji.*set data.domain=null"):
        check_domain(load_rows(own)[-1])
    check_domain(load_rows([*own, "data.domain=null"])[-1])


@pytest.mark.parametrize(
    ("overrides", "warns"),
    [
        (["method=svdquant"], True),
        (["method=loraq_o2"], False),  # reads no captions
        (["method=svdquant", "calibration.text=random"], False),
        (["method=svdquant", "data=file", "data.captions=my.txt"], False),
        (["method=svdquant", "model=tiny_pixart"], False),
    ],
)
def test_calibrating_on_captions_of_another_domain_is_said(overrides, warns, caplog):
    report_calibration(load_rows(["model=pixart_sigma", *overrides]))
    assert ("calibrates on captions of emoji" in caplog.text) == warns


def test_calibration_captions_of_a_set_need_its_folder():
    given = ["experiment=protocol", "data=captions", "model=tiny_pixart", "device=cpu"]
    with pytest.raises(LoraqError, match=r"calibration\.captions=FOLDER\. `loraq fetch qdiff"):
        experiment.run([*given, "data.captions=asset:captions.json"], progress=False)
