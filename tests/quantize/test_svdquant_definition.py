"""SVDQuant restated plainly in float64, one unit at a time; the library must choose the same."""

from __future__ import annotations

import torch

from loraq.capture import Activations
from loraq.quantizer import quantize_model
from tests.quantize.test_quantize import SVDQUANT
from tests.quantize.toy import Toy, toy_inputs, toy_layers

BLOCK, QMAX = 16, 7


def int4(x: torch.Tensor, unsigned: bool = False) -> torch.Tensor:
    """absmax / 7 (or max / 15 unsigned) per group of 16, scale in fp16, ties to even."""
    top = 15 if unsigned else QMAX
    blocks = x.unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1, keepdim=True) / top).half().double().clamp_min(1e-30)
    return (torch.round(blocks / scale).clamp(0 if unsigned else -top, top) * scale).flatten(-2)


def svd(w: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).half().double(), (root[:, None] * vh[:rank]).half().double()


def svdquant(x, w, rank, unsigned):
    """(smoothing exponents, Q, L, R) by the text of the method, nothing shared with the library."""
    y = x @ w.T

    def error(xs, q, left, right):
        branch = (xs.half().double() @ right.T).half().double() @ left.T
        return (int4(xs, unsigned) @ q.T + branch - y).square().sum().item()

    alphas = [i / 20 for i in range(1, 20)]
    grid = [(0.0, 0.0), *[(a, 0.0) for a in alphas], *[(a, 1 - a) for a in alphas]]
    judged = []
    for alpha, beta in grid:
        s = (x.abs().amax(0) ** alpha / w.abs().amax(0) ** beta).bfloat16().double()
        left, right = svd(w * s, rank)
        judged.append((error(x / s, int4(w * s - left @ right), left, right), alpha, beta, s))
    _, alpha, beta, s = min(judged, key=lambda entry: entry[0])
    ws, xs, q = w * s, x / s, torch.zeros_like(w)
    best = (float("inf"),)
    for _ in range(100):
        left, right = svd(ws - q, rank)
        q = int4(ws - left @ right)
        score = error(xs, q, left, right)
        if score >= best[0]:
            break
        best = (score, q, left, right)
    return (alpha, beta), best


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
        weights = [model.blocks[0][n].weight.detach() for n in names]
        w = torch.cat(weights).double()
        key = "blocks.0." + ("qkv" if unit == "to_q" else unit)
        x = inputs[key].float()
        if unit == "down":
            x = x + 0.171875
        exponents, (score, q, left, right) = svdquant(x.double(), w, 4, unit == "down")
        assert tuple(chosen[f"blocks.0.{unit}"]) == exponents
        plain, y = q + left @ right, inputs[key].double() @ w.T
        ours, outputs = [], []
        for n in names:
            t = quantised.layers[f"blocks.0.{n}"]
            ours.append(t.transform.weight(t.effective_weight()))
            outputs.append(t.forward(inputs[key].float()) - model.blocks[0][n].bias)
        # a code that sits on a rounding boundary may flip between float32 and float64
        assert (torch.cat(ours).double() - plain).norm() / plain.norm() < 0.01
        our_score = (torch.cat(outputs, -1).double() - y).square().sum().item()
        assert abs(our_score - score) / score < 0.02, f"{unit}: {our_score} for {score}"
