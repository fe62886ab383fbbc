"""Sensitivities on a toy model, against a second computation of the same ratio."""

from __future__ import annotations

import pytest
import torch

from loraq.config import Recipe
from loraq.quantization.grouping import make_units
from loraq.quantization.quantizer import quantize_model
from loraq.runner.sensitivity import measure_sensitivity
from loraq.runner.trajectories import Forward
from tests.quantization.toy import Toy, toy_layers
from tests.runner.test_trajectories import Exact, rtn


@pytest.fixture(scope="module")
def toy():
    """A toy model, recorded forwards (three steps of two batches), and its units."""
    model, g = Toy(), torch.Generator().manual_seed(1)
    spread = torch.linspace(0.3, 3, 32)
    made = []
    with torch.no_grad():
        for step in (0, 1, 2) * 2:
            x = torch.randn(4, 16, 32, generator=g) * spread
            made.append(Forward(step, (x,), {}, model(x)))
    return model, made, make_units(toy_layers(), share_qkv=True)


def test_sensitivity_is_the_ratio_of_output_to_layer_error(toy):
    """Reference: layer and output errors computed with explicit hooks, one unit at a time."""
    model, forwards, units = toy
    got = measure_sensitivity(model, units, rtn("int4"), forwards, progress=None)
    assert list(got) == [unit.name for unit in units] and min(got.values()) > 0
    packed = quantize_model(model, toy_layers(), rtn("int4"), progress=None).layers
    with torch.no_grad():
        for unit in units:
            layer_sums, output_sums = torch.zeros(2), torch.zeros(2)
            for f in forwards:
                linears = {l.name: model.get_submodule(l.name) for l in unit.layers}
                seen = _read_by(model, linears, f)
                for name, linear in linears.items():
                    y = linear(seen[name])
                    error = packed[name].forward(seen[name]) - y
                    pair = error.square().sum(), (y - linear.bias).square().sum()
                    layer_sums += torch.stack(pair)
                    model.set_submodule(name, Exact(packed[name]))
                error = model(*f.args) - f.output
                output_sums += torch.stack((error.square().sum(), f.output.square().sum()))
                for name, linear in linears.items():
                    model.set_submodule(name, linear)
            expected = (output_sums[0] / output_sums[1]) / (layer_sums[0] / layer_sums[1])
            assert got[unit.name] == pytest.approx(expected.item(), rel=1e-3)


def _read_by(model: Toy, linears: dict, forward: Forward) -> dict[str, torch.Tensor]:
    seen: dict[str, torch.Tensor] = {}
    handles = [
        linear.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name, linear in linears.items()
    ]
    model(*forward.args)
    for handle in handles:
        handle.remove()
    return seen


def test_sensitivity_depends_neither_on_order_nor_on_what_else_the_recipe_does(toy):
    model, forwards, units = toy
    got = measure_sensitivity(model, units, rtn("int4"), forwards, progress=None)
    backwards = measure_sensitivity(model, units[::-1], Recipe(), forwards, progress=None)
    assert backwards == got and list(backwards) == list(got)[::-1]


def test_a_unit_without_error_has_no_sensitivity(toy):
    model, forwards, units = Toy(), toy[1], toy[2]
    with torch.no_grad():
        model.blocks[0]["down"].weight.zero_()
    got = measure_sensitivity(model, units, rtn("int4"), forwards, progress=None)
    assert got["blocks.0.down"] == 0.0 < got["blocks.1.down"]
