"""Allocation: the solver against brute force, the budget, sensitivities, and the prediction."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from loraq.config import AllocationConfig, BranchConfig, FormatConfig, Recipe
from loraq.errors import LoraqError
from loraq.formats import get_format
from loraq.models import Layer
from loraq.quantization.allocation import solver
from loraq.quantization.allocation.allocate import allocate_units, candidate_ranks, unit_bits
from loraq.quantization.allocation.prediction import (
    energy_spectrum,
    gaussian_error,
    predicted_error,
    white_energy_fraction,
)
from loraq.quantization.grouping import Unit, UnitAllocation, make_units
from loraq.quantization.layer_errors import layer_errors
from loraq.quantization.quantizer import quantize_model

O2 = BranchConfig(kind="loraq", rank=8)
SHAPES = {"out": (128, 128), "up": (256, 128), "down": (128, 256)}
EXACT = 1e-9


def recipe(kind: str, branch: BranchConfig = O2, **changes) -> Recipe:
    return Recipe(branch=branch, allocation=AllocationConfig(kind=kind), **changes)


def weight(shape: tuple[int, int], decay: float, floor: float, seed: int) -> torch.Tensor:
    """Random directions, singular values exp(−j/decay) + floor."""
    g = torch.Generator().manual_seed(seed)
    least = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, least, generator=g))[0] for n in shape)
    return (u * (torch.exp(-torch.arange(least) / decay) + floor)) @ v.T


def units_and_weights(blocks: int = 4) -> tuple[list[Unit], dict[str, torch.Tensor]]:
    """Units of three shapes, whose spectra differ by depth and shape."""
    layers, weights = [], {}
    for b, (role, shape) in itertools.product(range(blocks), SHAPES.items()):
        name = f"blocks.{b}.{role}"
        layers.append(Layer(name, role, shape, name))
        weights[name] = weight(shape, 2.0 + 5 * b, 0.05 + 0.03 * len(role), seed=len(layers))
    return make_units(layers, share_qkv=True), weights


def total_bits(units, shares, chosen) -> int:
    return sum(unit_bits(unit, shares[unit.name], chosen) for unit in units)


def error_of(unit: Unit, share: UnitAllocation, weights, chosen: Recipe) -> float:
    formats = UnitAllocation(1, share.weight_bits).apply_to(chosen).formats()
    energy_K = energy_spectrum(unit.stack(weights))
    return predicted_error(energy_K, unit.shape, [share.rank], formats, chosen)[0]


OPTIONS = st.lists(
    st.tuples(st.integers(0, 1000), st.integers(1, 100)), min_size=2, max_size=5, unique=True
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(OPTIONS, min_size=3, max_size=3), st.integers(0, 99))
def test_the_solver_finds_what_brute_force_finds(table, percent):
    costs = [np.array([c for c, _ in options], float) for options in table]
    bits = [np.array([b for _, b in options]) for options in table]
    least, most = sum(b.min() for b in bits), sum(b.max() for b in bits)
    budget = int(least + (most - least) * percent // 100)
    best = min(
        sum(c for c, _ in choice)
        for choice in itertools.product(*table)
        if sum(b for _, b in choice) <= budget
    )
    problem = solver.Knapsack(costs, bits, budget)
    chosen = problem.solve()
    assert sum(int(b[k]) for b, k in zip(bits, chosen, strict=True)) <= budget
    cost = sum(c[k] for c, k in zip(costs, chosen, strict=True))
    assert cost <= best * (1 + solver.RELATIVE_GAP)
    assert problem.lower <= best + 1e-6 and best <= problem.upper
    with pytest.raises(LoraqError, match=r"above the budget.*Raise quant\.branch\.budget"):
        solver.Knapsack(costs, bits, int(least) - 1)


def test_the_integer_program_runs_where_the_bounds_leave_it_open(monkeypatch):
    """Sizes 3, 3 and 5 in a budget of 6: the greedy choice is 5, the optimum both of 3."""
    costs = [np.array([30.0, 0.0]), np.array([30.0, 0.0]), np.array([56.0, 0.0])]
    bits = [np.array([1, 4]), np.array([1, 4]), np.array([1, 6])]
    assert solver.Knapsack(costs, bits, 9).feasible_U.tolist() == [0, 0, 1]
    assert solver.Knapsack(costs, bits, 9).solve() == [1, 1, 0]
    from scipy import optimize

    class GaveUp:
        success, status, message = False, 4, "numerical difficulties"

    monkeypatch.setattr(optimize, "milp", lambda *_, **__: GaveUp)
    with pytest.raises(LoraqError, match=r"status 4 \(numerical difficulties\).*kind=uniform"):
        solver.Knapsack(costs, bits, 9).solve()


@pytest.mark.parametrize("kind", ["rank", "bits", "both"])
@pytest.mark.parametrize("factor", ["int8", "int4", "mxint8"])
def test_the_budget_is_kept_and_filled(kind, factor):
    units, weights = units_and_weights()
    chosen = recipe(kind, branch_weight=FormatConfig(factor))
    sensitivity = {unit.name: 3.0**-number for number, unit in enumerate(units)}
    for asked in (None, sensitivity):
        shares = allocate_units(units, weights, chosen, 20, asked)
        budget = total_bits(units, {unit.name: UnitAllocation(20) for unit in units}, chosen)
        assert 0.995 * budget < total_bits(units, shares, chosen) <= budget
        assert shares == allocate_units(units, weights, chosen, 20, asked)


@pytest.mark.parametrize("kind", ["rank", "bits", "both"])
def test_no_allocation_is_predicted_to_be_worse_than_the_uniform_one(kind):
    units, weights = units_and_weights()
    chosen = recipe(kind)
    shares = allocate_units(units, weights, chosen, 8, None)
    error, uniform = (
        sum(error_of(unit, each[unit.name], weights, chosen) for unit in units)
        for each in (shares, {unit.name: UnitAllocation(8) for unit in units})
    )
    assert error <= uniform
    assert kind == "bits" or error < 0.99 * uniform


def test_bits_go_to_what_matters_under_one_common_rank():
    units, weights = units_and_weights()
    for factor, expected in ((1.0, None), (100.0, 8)):
        sensitivity = {unit.name: 1.0 for unit in units} | {"blocks.1.up": factor}
        shares = allocate_units(units, weights, recipe("bits"), 20, sensitivity)
        assert shares["blocks.1.up"].weight_bits == expected
        steps = candidate_ranks(20, 20)
        places = sorted(steps.index(share.rank) for share in shares.values())
        assert steps[places[-1]] < 20 and places[-1] - places[0] <= 1


@pytest.mark.parametrize("kind", ["rank", "both"])
def test_equal_units_get_equal_allocations_or_differ_by_one_step(kind, monkeypatch):
    monkeypatch.setattr(solver, "RELATIVE_GAP", EXACT)
    names = [f"blocks.{b}.out" for b in range(5)]
    units = make_units([Layer(n, "out", (128, 128), n) for n in names], share_qkv=True)
    same = weight((128, 128), 8, 0.1, seed=0)
    shares = allocate_units(units, dict.fromkeys(names, same), recipe(kind), 10, None)
    assert len({share.weight_bits for share in shares.values()}) == 1
    places = [candidate_ranks(128, 10).index(share.rank) for share in shares.values()]
    assert max(places) - min(places) <= 1


@pytest.mark.parametrize("kind", ["rank", "bits", "both"])
def test_a_unit_that_matters_more_is_never_predicted_to_be_worse(kind, monkeypatch):
    monkeypatch.setattr(solver, "RELATIVE_GAP", EXACT)
    units, weights = units_and_weights(blocks=2)
    chosen, raised = recipe(kind), units[4]
    errors = []
    for factor in (1, 2, 4, 8, 64):
        sensitivity = {unit.name: 1.0 for unit in units} | {raised.name: float(factor)}
        share = allocate_units(units, weights, chosen, 12, sensitivity)[raised.name]
        errors.append(error_of(raised, share, weights, chosen))
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(errors))
    assert errors[-1] < errors[0]


def test_a_steep_spectrum_gets_rank_until_it_is_used_up():
    names = ["blocks.0.steep", "blocks.0.flat"]
    units = make_units([Layer(n, "out", (128, 128), n) for n in names], share_qkv=True)
    g = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(128, 12, generator=g))[0] for _ in range(2))
    steep = left @ right.T + 0.002 * torch.randn(128, 128, generator=g)
    weights = dict(zip(names, (steep, torch.randn(128, 128, generator=g)), strict=True))
    for uniform, steep_rank in ((4, 8), (6, 12), (24, 12)):
        shares = allocate_units(units, weights, recipe("rank"), uniform, None)
        assert shares[names[0]].rank == pytest.approx(steep_rank, abs=1)
        assert shares[names[1]].rank == pytest.approx(2 * uniform - steep_rank, abs=2)
    compensate = replace(O2, objective="compensate", start="error")
    shares = allocate_units(units, weights, recipe("rank", compensate), 12, None)
    ranks = [shares[name].rank for name in names]
    assert abs(ranks[0] - ranks[1]) <= 2  # the error's spectrum is flat, whatever the weight's is


def test_a_branch_that_increases_the_error_is_omitted():
    units, weights = units_and_weights()
    four_bits = FormatConfig("int4")
    branch = BranchConfig(kind="svd", rank=8)
    chosen = recipe("rank", branch, branch_weight=four_bits, branch_activation=four_bits)
    assert {s.rank for s in allocate_units(units, weights, chosen, 8, None).values()} == {0}


@pytest.mark.parametrize(
    "branch",
    [
        BranchConfig(kind="svd", rank=16),
        BranchConfig(kind="loraq", rank=16),
        BranchConfig(kind="alternating", rank=16),
        BranchConfig(kind="svd", objective="compensate", start="error", rank=16),
        BranchConfig(kind="loraq", objective="compensate", start="error", rank=16),
    ],
    ids=lambda branch: f"{branch.kind}-{branch.objective}",
)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("rank", [4, 32])
def test_the_prediction_is_the_measured_output_error_within_a_quarter(branch, bits, rank):
    main = FormatConfig(f"int{bits}")
    chosen = Recipe(main, main, branch=replace(branch, rank=rank))
    layers = [Layer(name, name, shape, name) for name, shape in SHAPES.items()]
    model = nn.ModuleDict({n: nn.Linear(i, o, bias=False) for n, (o, i) in SHAPES.items()})
    for number, (name, shape) in enumerate(SHAPES.items()):
        model[name].weight.data = weight(shape, 8, 0.05, seed=number)
    g = torch.Generator().manual_seed(1)
    inputs = {name: torch.randn(256, i, generator=g) for name, (_, i) in SHAPES.items()}
    packed = quantize_model(model, layers, chosen, progress=None)
    weights = {name: module.weight.data for name, module in model.items()}
    for unit, row in zip(
        make_units(layers, True), layer_errors(packed, model, layers, inputs), strict=True
    ):
        predicted = error_of(unit, UnitAllocation(rank), weights, chosen)
        assert row["output_error"] ** 2 == pytest.approx(predicted, rel=0.25)


def test_allocated_bits_equal_stored_bits():
    units, weights = units_and_weights(blocks=2)
    layers = [layer for unit in units for layer in unit.layers]
    model = nn.Module()
    for layer in layers:
        parent = model
        for part in layer.name.split(".")[:-1]:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        linear = nn.Linear(layer.shape[1], layer.shape[0], bias=False)
        linear.weight.data = weights[layer.name]
        parent.add_module(layer.name.split(".")[-1], linear)
    for kind in ("rank", "both"):
        chosen = recipe(kind, replace(O2, steps=1))
        shares = allocate_units(units, weights, chosen, 8, None)
        packed = quantize_model(model, layers, chosen, progress=None)
        assert 8 * packed.nbytes == total_bits(units, shares, chosen)


def test_the_white_energy_fraction_matches_random_matrices():
    g = torch.Generator().manual_seed(0)
    for shape in ((192, 192), (384, 192), (96, 384)):
        energy = energy_spectrum(torch.randn(shape, generator=g)).cumsum()
        ranks = [1, 4, 16, 64, 96]
        assert white_energy_fraction(shape, ranks) == pytest.approx(
            energy[np.array(ranks) - 1], abs=0.01
        )
        assert white_energy_fraction(shape, [0, min(shape)]) == pytest.approx([0, 1])


def test_the_spectrum_is_the_svds_and_zeros_are_left_zero():
    w_OI = weight((64, 96), 5, 0.01, seed=3)
    energy = torch.linalg.svdvals(w_OI.double()).square()
    assert energy_spectrum(w_OI) == pytest.approx((energy / energy.sum()).numpy(), rel=1e-9)
    formats = Recipe().formats()
    nothing = energy_spectrum(torch.zeros(8, 8))
    assert not predicted_error(nothing, (8, 8), [0, 4], formats, recipe("rank")).any()


def test_a_formats_gaussian_error():
    assert gaussian_error(get_format("fp16"), 64) < 1e-6
    one_scale_for_one_value = get_format("int4", block=1)
    assert gaussian_error(one_scale_for_one_value, 64) < 1e-6
    int4, int8 = (gaussian_error(get_format(name), 128) for name in ("int4", "int8"))
    assert int4 / int8 == pytest.approx((127 / 7) ** 2, rel=0.1)  # the step is absmax / 7 or / 127


def test_candidate_ranks():
    ranks = candidate_ranks(384, 19)
    assert ranks[:17] == list(range(17)) and 19 in ranks and ranks[-1] == 384
    assert all(b - a <= max(1, a / 8) for a, b in itertools.pairwise(ranks))
    assert candidate_ranks(8, 8) == list(range(9))


def test_invalid_arguments_raise():
    units, weights = units_and_weights(blocks=1)
    with pytest.raises(LoraqError, match=r"rank 0 has none.*Use a method with a branch"):
        allocate_units(units, weights, recipe("rank"), 0, None)
    some = {unit.name: 1.0 for unit in units[1:]}
    with pytest.raises(LoraqError, match=r"'blocks\.0\.out' is None.*sensitivity=weights"):
        allocate_units(units, weights, recipe("rank"), 8, some)
    with pytest.raises(LoraqError, match=r"'blocks\.0\.out' is nan"):
        allocate_units(units, weights, recipe("rank"), 8, some | {units[0].name: float("nan")})


def test_uniform_allocations_are_equal():
    units, weights = units_and_weights(blocks=1)
    shares = allocate_units(units, weights, recipe("uniform"), 8, None)
    assert set(shares.values()) == {UnitAllocation(8)}
