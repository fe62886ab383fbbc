"""SVDQuant on a toy model against its float64 reference; the library must choose the same."""

from __future__ import annotations

import torch

from loraq.quantization.activations import Activations
from loraq.quantization.quantizer import quantize_model
from tests.quantization.svdquant_restated import Unit
from tests.quantization.test_quantize import SVDQUANT
from tests.quantization.toy import Toy, toy_inputs, toy_layers

BLOCK, RANK, SHIFT = 16, 4, 0.171875


@torch.no_grad()
def test_the_library_follows_the_definition_on_every_unit():
    model = Toy(seed=3)
    inputs = toy_inputs(model, rows=128)
    quantised = quantize_model(model, toy_layers(), SVDQUANT, Activations(inputs), progress=None)
    chosen = {}
    for notes in quantised.info.values():
        chosen |= notes["smoothing"]
    for unit, names in {
        "to_q": ("to_q", "to_k", "to_v"), "to_out": ("to_out",), "up": ("up",), "down": ("down",)
    }.items():  # fmt: skip
        w = torch.cat([model.blocks[0][n].weight for n in names]).double()
        key = "blocks.0." + ("qkv" if unit == "to_q" else unit)
        x = inputs[key].float()
        if unit == "down":
            x = x + SHIFT
        restated = Unit(x.double(), w, RANK, BLOCK, unit == "down")
        grid = restated.judge_smoothing()
        exponents = min(grid, key=lambda candidate: grid[candidate])
        assert tuple(chosen[f"blocks.0.{unit}"]) == exponents
        layer, scores = restated.alternate(exponents)
        plain, y = layer.main_OI + layer.left_OR @ layer.right_RI, inputs[key].double() @ w.T
        ours, outputs = [], []
        for n in names:
            t = quantised.layers[f"blocks.0.{n}"]
            ours.append(t.transform.weight(t.effective_weight()))
            outputs.append(t.forward(inputs[key].float()) - model.blocks[0][n].bias)
        # a code that sits on a rounding boundary may flip between float32 and float64
        assert (torch.cat(ours).double() - plain).norm() / plain.norm() < 0.01
        our_score = (torch.cat(outputs, -1).double() - y).square().sum().item()
        score = min(scores)
        assert abs(our_score - score) / score < 0.02, f"{unit}: {our_score} for {score}"
