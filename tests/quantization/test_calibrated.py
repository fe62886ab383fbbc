"""Calibrated recipes: captured activations, and allocated ranks and bits in the packed layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraq.config import AllocationConfig, BranchConfig, RoundingConfig, TransformConfig
from loraq.errors import LoraqError
from loraq.models.moments import Moment
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import (
    InputCapture,
    MomentCapture,
    moment_tensors,
    moments_from_tensors,
)
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model
from loraq.transforms.hadamard import random_signs
from loraq.transforms.input_transform import InputTransform
from tests.quantization.test_quantize import O2, RTN
from tests.quantization.toy import Toy, toy_inputs, toy_layers


def toy_moments(model: Toy):
    g = torch.Generator().manual_seed(0)
    with torch.no_grad(), MomentCapture(model, toy_layers()) as capture:
        for tokens in (16, 8):  # forwards of unequal size weigh by their tokens
            model(torch.randn(4, tokens, 32, generator=g) * torch.linspace(0.3, 3, 32))
    return capture.moments()


def mean_error(model, recipe, activations, key="output_error"):
    q = quantize_model(model, toy_layers(), recipe, activations, progress=None)
    rows = layer_errors(q, model, toy_layers(), toy_inputs(model, seed=5))
    return sum(row[key] for row in rows) / len(rows)


def test_a_layer_of_zeros_has_no_error():
    model = Toy()
    for name in ("weight", "bias"):
        getattr(model.blocks[0]["to_out"], name).data.zero_()
    q = quantize_model(model, toy_layers(), RTN, progress=None)
    rows = layer_errors(q, model, toy_layers(), toy_inputs(model, seed=5))
    of_zeros = next(row for row in rows if row["layer"] == "blocks.0.to_out")
    assert of_zeros["weight_error"] == of_zeros["output_error"] == 0
    assert all(0 < row["output_error"] < 1 for row in rows if row is not of_zeros)


def test_moments_are_those_of_every_token_seen():
    model, seen = Toy(), []
    hook = model.blocks[0]["up"].register_forward_pre_hook(
        lambda _m, args: seen.append(args[0].reshape(-1, 32))
    )
    moments = toy_moments(model)
    hook.remove()
    x = torch.cat(seen)
    assert x.shape[0] == 4 * 24
    held = moments["blocks.0.up"]
    assert torch.allclose(held.second_II, x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    assert torch.allclose(held.mean_I, x.mean(0), rtol=1e-4, atol=1e-5)
    named = {name: x for part in moment_tensors(moments) for name, x in part.items()}
    again = moments_from_tensors(named)
    assert all(torch.equal(again[k].second_II, moments[k].second_II) for k in moments)


def large(factor: float) -> Toy:
    """A model, equal in function for a power of two, with `factor` times the inputs of to_out."""
    model = Toy()
    for block in model.blocks:
        block["to_v"].weight.data *= factor
        block["to_v"].bias.data *= factor
        block["to_out"].weight.data /= factor
    return model


@pytest.mark.parametrize("scratch", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_beyond_float16_are_kept_as_the_model_computes_them(tmp_path, dtype, scratch):
    model, seen = Toy().to(dtype), []
    model.blocks[0]["up"].register_forward_pre_hook(lambda _m, args: seen.append(args[0][0]))
    folder = tmp_path if scratch else None
    with torch.no_grad(), InputCapture(model, toy_layers(), 48, 3, 0, folder) as capture:
        for factor in (1.0, 4e6, 1e-9, 1.0):  # one forward more than expected
            torch.manual_seed(1)
            model.blocks[0]["up"](torch.randn(1, 16, 32).to(dtype) * factor)
    kept = capture.inputs()["blocks.0.up"]
    assert kept.dtype == dtype and kept.shape == (64, 32)
    for number, x in enumerate(seen):  # all 16 rows were drawn, in another order
        found = kept[16 * number : 16 * (number + 1)]
        order, other = x[:, 0].argsort(), found[:, 0].argsort()
        allowed = 2.0**-11 if number == 0 else 0.0  # the first forward was rounded to float16
        assert (found[other] - x[order]).abs().max() <= allowed * x.abs().max()


def test_small_rows_are_kept_as_the_model_computes_them():
    model = Toy()
    with torch.no_grad(), InputCapture(model, toy_layers(), 8, 1, 0) as capture:
        model.blocks[0]["up"](torch.full((8, 32), 1e-7))
    assert torch.equal(capture.inputs()["blocks.0.up"], torch.full((8, 32), 1e-7))


@pytest.mark.parametrize(
    "change",
    [
        {"branch": BranchConfig("none")},
        {"branch": BranchConfig("none"), "rounding": RoundingConfig("gptq")},
        {"transform": TransformConfig("balanced")},
        {"transform": TransformConfig("search"), "branch": BranchConfig("svd", rank=4)},
        {"branch": BranchConfig("loraq", rank=4, weighting="full")},
        {"branch": BranchConfig("svd", "compensate", "error", rank=4, weighting="magnitude")},
    ],
)
def test_methods_work_with_activations_beyond_float16(change):
    formats = {
        operand: replace(getattr(O2, operand), scale="bf16")
        for operand in ("weight", "activation", "branch_weight", "branch_activation")
    }
    recipe = replace(O2, **formats, **change)
    recipe = replace(recipe, branch=replace(recipe.branch, share_qkv=False))
    found = {}
    for factor in (1.0, 2.0**21):
        model = large(factor)
        rows = toy_inputs(model)
        assert (rows["blocks.0.to_out"].float().abs().max() > 65504) == (factor > 1)
        found[factor] = mean_error(model, recipe, Activations(rows, toy_moments(model)))
    assert found[2.0**21] == pytest.approx(found[1.0], rel=0.02)


def test_captures_with_nan_stop_the_methods_that_read_them_only(caplog):
    model = Toy()
    rows, moments = toy_inputs(model), toy_moments(model)
    rows["blocks.1.up"][3, 5] = float("nan")
    moments["blocks.0.down"].second_II[2, 2] = float("inf")
    broken = Activations(rows=rows, moments=moments)
    gptq = replace(RTN, rounding=RoundingConfig("gptq"))
    smooth = replace(O2, branch=BranchConfig("svd", rank=4), transform=TransformConfig("search"))
    for recipe, words in (
        (gptq, "second moments of input 'blocks.0.down'"),
        (smooth, "rows of input 'blocks.1.up'"),
    ):
        with pytest.raises(LoraqError, match=f"{words} contain NaN or Inf.*bfloat16"):
            quantize_model(model, toy_layers(), recipe, broken, progress=None)
    model = quantize_model(model, toy_layers(), O2, broken, progress=None)
    errors = layer_errors(model, Toy(), toy_layers(), rows)
    assert all(0 < entry["output_error"] < 1 for entry in errors)
    assert "1 of 64 captured rows of input 'blocks.1.up' contain NaN or Inf" in caplog.text


def test_captures_in_mapped_files_equal_those_in_memory(tmp_path):
    """With a scratch folder, captures take no anonymous memory (gigabytes at full size)."""
    model, layers = Toy(), toy_layers()
    for folder in (None, tmp_path / "scratch"):
        g = torch.Generator().manual_seed(0)
        # three forwards instead of the expected two: the buffer grows
        with (
            torch.no_grad(),
            InputCapture(model, layers, 8, 2, 0, folder and folder / "rows") as rows,
            MomentCapture(model, layers, folder and folder / "moments") as moments,
        ):
            for _ in range(3):
                model(torch.randn(4, 6, 32, generator=g))
        if folder is None:
            plain = rows.inputs(), moments.moments()
    assert rows.inputs()["blocks.0.up"].shape == (3 * 4, 32)
    assert all(torch.equal(x, plain[0][name]) for name, x in rows.inputs().items())
    for name, moment in moments.moments().items():
        assert torch.equal(moment.second_II, plain[1][name].second_II)
    held = Path("/proc/self/maps").read_text().count(str(folder / "moments"))
    assert held == len(plain[1])


def test_a_transforms_moment_is_that_of_its_outputs():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(500, 32, generator=g) + torch.linspace(-1, 1, 32)
    t = InputTransform(
        smooth_I=torch.rand(1, 1, 32, generator=g) + 0.5,
        signs_I=random_signs(32, g)[None, None],
        block=16,
        shift=0.171875,
    )
    y = t.input(x[None])[0]
    second = t.moment((x.T @ x / len(x))[None], x.mean(0)[None])[0]
    assert torch.allclose(second, y.T @ y / len(y), rtol=1e-3, atol=1e-4)


def test_gptq_lowers_the_output_error_and_raises_the_weights():
    model = Toy()
    read = Activations(moments=toy_moments(model))
    weights_only = replace(RTN, activation=replace(RTN.activation, name="fp16", block=None))
    gptq = replace(weights_only, rounding=RoundingConfig("gptq"))
    assert gptq.needs_moments and not gptq.needs_rows
    assert mean_error(model, gptq, read) < 0.9 * mean_error(model, weights_only, None)
    errors = [mean_error(model, r, read, "weight_error") for r in (gptq, weights_only)]
    assert errors[0] > errors[1]


def test_weighted_branches_lower_the_output_error():
    model = Toy()
    read = Activations(rows=toy_inputs(model), moments=toy_moments(model))
    lqer = replace(O2, branch=BranchConfig("svd", "compensate", "error", rank=4))
    fp16 = replace(lqer.activation, name="fp16", block=None)
    errors = {
        weighting: mean_error(
            model,
            replace(lqer, activation=fp16, branch=replace(lqer.branch, weighting=weighting)),
            read,
        )
        for weighting in ("none", "magnitude", "diagonal", "full")
    }
    assert errors["full"] < errors["diagonal"] < errors["none"]
    assert errors["magnitude"] < errors["none"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"rounding": RoundingConfig("gptq")}, "moments"),
        ({"branch": BranchConfig("loraq", rank=4, weighting="full")}, "moments"),
        ({"branch": BranchConfig("loraq", rank=4, weighting="magnitude")}, "rows"),
        ({"transform": TransformConfig("balanced")}, "moments"),
        ({"allocation": AllocationConfig("rank", "activations")}, "sensitivity"),
    ],
)
def test_missing_activations_are_named(change, word):
    recipe = replace(O2, **change)
    assert recipe.needs_calibration
    with pytest.raises(LoraqError, match=f"no calibration {word}"):
        quantize_model(Toy(), toy_layers(), recipe, Activations(), progress=None)


def test_a_recipe_gets_only_the_activations_it_reads():
    moments = {"b": Moment(torch.eye(2), torch.zeros(2))}
    read = Activations(rows={"a": torch.ones(1, 2)}, moments=moments, sensitivity={"c": 3})
    assert read.restricted_to(O2) == Activations()
    gptq = replace(O2, rounding=RoundingConfig("gptq"))
    assert read.restricted_to(gptq) == Activations(moments=moments)


@pytest.mark.parametrize("hadamard", [0, 16])
def test_balanced_smoothing_lowers_the_output_error(hadamard):
    model = Toy()
    plain = replace(RTN, transform=TransformConfig(hadamard=hadamard))
    balanced = replace(RTN, transform=TransformConfig("balanced", hadamard))
    read = Activations(moments=toy_moments(model))
    assert mean_error(model, balanced, read) < 0.97 * mean_error(model, plain, None)


def test_statistics_of_the_weights_need_a_family():
    recipe = replace(O2, transform=TransformConfig("balanced"), statistics="weights")
    assert not recipe.needs_calibration
    with pytest.raises(LoraqError, match="statistics=activations"):
        quantize_model(Toy(), toy_layers(), recipe, progress=None)


def test_statistics_of_the_weights_that_nothing_reads_are_refused():
    with pytest.raises(LoraqError, match="no effect"):
        replace(O2, statistics="weights")
    searched, gptq = TransformConfig("search"), RoundingConfig("gptq")
    with pytest.raises(LoraqError, match="also reads rows"):
        replace(O2, transform=searched, rounding=gptq, statistics="weights")


@pytest.mark.parametrize("kind", ["rank", "both"])
def test_allocated_ranks_fit_the_uniform_ranks_memory(kind):
    model = Toy()
    o2 = replace(O2, branch=replace(O2.branch, rank=8))
    uniform = quantize_model(model, toy_layers(), o2, progress=None)
    recipe = replace(o2, allocation=AllocationConfig(kind))
    given = quantize_model(model, toy_layers(), recipe, progress=None)
    assert len(given.ranks) > 1 and given.nbytes <= uniform.nbytes
    with pytest.raises(LoraqError, match="read `ranks`"):
        _ = given.rank
    q, k = given.layers["blocks.0.to_q"], given.layers["blocks.0.to_k"]
    assert q.right is k.right  # stacked layers still share R


def test_a_sensitive_unit_gets_a_higher_rank():
    model, units = Toy(), ("blocks.0.to_q", "blocks.0.to_out", "blocks.0.up", "blocks.0.down")
    names = [*units, *(u.replace("blocks.0", "blocks.1") for u in units)]
    recipe = replace(O2, allocation=AllocationConfig("rank", "activations"))
    ranks = []
    for weight in (1.0, 50.0):
        read = Activations(sensitivity=dict.fromkeys(names, 1.0) | {"blocks.1.up": weight})
        given = quantize_model(model, toy_layers(), recipe, read, progress=None)
        ranks.append(given.layers["blocks.1.up"].left.shape[-1])
    assert ranks[1] > ranks[0]
