"""SVDQuant on real layers of the embedded model against its float64 reference.

One unit of every role, from blocks 0 and 3 (eight layers: q, k, v are one stacked unit), with
activations captured while the 16-bit model runs: four captions, four steps, 256 rows an input.
Alternation is chaotic: a perturbation in float32's last bits changes most codes within ten rounds.
So equal rounds mean equal codes, and a library that differs anywhere on the way fails here.
"""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import pytest
import torch

from loraq.compose import load_rows
from loraq.data import Prompt
from loraq.models import list_layers, load_pipeline
from loraq.quantization.activations import Activations
from loraq.quantization.budget import planned_branch_bits
from loraq.quantization.calibration import InputCapture
from loraq.quantization.grouping import make_units
from loraq.quantization.quantizer import quantize_model
from loraq.runner.generate import image_batch
from loraq.utils.assets import resolve_asset
from tests.quantization.svdquant_restated import Unit, full_svd, leading_svd

BLOCK = {"self_q": 0, "self_out": 3, "cross_q": 0, "cross_out": 3, "ff_up": 0, "ff_down": 3}
"""First role of a unit → the transformer block that the tested unit is taken from."""

GROUP, SHIFT, ROWS, STEPS, CAPTIONS = 64, 0.171875, 256, 4, 4
TIE = 1e-6  # candidates whose scores are this close are one choice: float32 resolves no more


@pytest.fixture(scope="module")
def setup():
    """(16-bit transformer, rank of the preset, units by first role, rows, quantised model)."""
    preset = load_rows(["method=svdquant"])[-1]
    model, recipe = replace(preset.model, steps=STEPS), preset.quant
    pipe = load_pipeline(model, "cpu")
    every = list_layers(pipe.transformer, model.family, recipe.skip)
    rank, _ = planned_branch_bits(every, recipe)  # what the budget buys on the whole set
    units = {
        unit.roles[0]: unit
        for unit in make_units(every, recipe.branch.share_qkv)
        if unit.name.startswith(f"transformer_blocks.{BLOCK[unit.roles[0]]}.")
    }
    layers = [layer for unit in units.values() for layer in unit.layers]
    splits = json.loads(resolve_asset("asset:captions.json").read_text())
    prompts = [Prompt(**entry) for entry in splits["calibration"][:CAPTIONS]]
    with InputCapture(pipe.transformer, layers, ROWS, STEPS, seed=0) as capture:
        image_batch(pipe, model, prompts, seed=0, output_type="latent")
    rows = capture.inputs()
    recipe = replace(recipe, branch=replace(recipe.branch, rank=rank))
    made = quantize_model(pipe.transformer, layers, recipe, Activations(rows), progress=None)
    return pipe.transformer, rank, units, rows, made


def weights(transformer, unit) -> tuple[torch.Tensor, torch.Tensor]:
    """(W, bias) of the unit's stacked layers, float64."""
    linears = [transformer.get_submodule(layer.name) for layer in unit.layers]
    w_OI = torch.cat([linear.weight.detach() for linear in linears]).double()
    return w_OI, torch.cat([linear.bias.detach() for linear in linears]).double()


def test_eight_layers_of_different_roles_and_two_blocks(setup):
    _, rank, units, rows, made = setup
    roles = [role for unit in units.values() for role in unit.roles]
    assert len(made.layers) == len(set(roles)) == 8
    assert {unit.name.split(".")[1] for unit in units.values()} == {"0", "3"}
    assert len(made.info) == len(units)  # a group each, so that a group's notes are its unit's
    assert made.rank == rank > 4
    assert all(len(x_TI) == ROWS for x_TI in rows.values())


@pytest.mark.parametrize("role", ["cross_out", "ff_down"])
def test_the_quick_decomposition_of_the_grid_is_the_full_one(setup, role):
    transformer, rank, units, _, _ = setup
    w_OI, _ = weights(transformer, units[role])
    quick, full = (left @ right for left, right in (leading_svd(w_OI, rank), full_svd(w_OI, rank)))
    assert (quick - full).norm() / full.norm() < 1e-5  # an fp16 value may fall to the other side


@torch.no_grad()
@pytest.mark.parametrize("role", BLOCK)
def test_the_library_chooses_and_computes_what_the_definition_does(setup, role):
    transformer, rank, units, rows, made = setup
    unit, shifted = units[role], role == "ff_down"
    w_OI, bias_O = weights(transformer, unit)
    x_TI = rows[unit.input_id].float()
    xs_TI = (x_TI + SHIFT if shifted else x_TI).double()
    restated = Unit(xs_TI, w_OI, rank, GROUP, shifted)
    notes = next(notes for notes in made.info.values() if unit.name in notes["smoothing"])

    chosen = tuple(notes["smoothing"][unit.name])
    grid = restated.judge_smoothing(leading_svd)
    expected = min(grid, key=lambda candidate: grid[candidate])
    if chosen != expected:
        scores = f"{chosen} scores {grid[chosen]}, {expected} scores {grid[expected]}"
        assert grid[chosen] <= grid[expected] * (1 + TIE), scores
        warnings.warn(f"{unit.name}: two smoothings tie, {scores}", stacklevel=1)

    layer, scores = restated.alternate(chosen)
    energy = (xs_TI @ w_OI.T).square().sum().item()
    rounds = [math.sqrt(score / energy) for score in scores]
    # losses: the best so far, a value a round, so that the last repeats the best round's
    losses = notes["losses"]
    assert losses.index(min(losses)) == rounds.index(min(rounds))
    assert losses == pytest.approx([*rounds[:-1], rounds[-2]], rel=1e-4)

    fold_O = SHIFT * w_OI.sum(1) if shifted else 0.0
    expected_TO = layer.output(xs_TI) + bias_O - fold_O
    outputs = [made.layers[entry.name].forward(x_TI) for entry in unit.layers]
    difference = (torch.cat(outputs, -1).double() - expected_TO).norm() / expected_TO.norm()
    assert difference < 1e-3
