"""Benchmarks of quantisation: both ways reach equal errors; FLOPs, bytes and pairs are correct."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from experiments.bench import again
from experiments.bench.floor import OperationProfile, operation_kind
from experiments.bench.quantise import METHODS, SAME_ERROR, reference_way, weight_error
from loraq import recipe
from loraq.quantization.quantizer import quantize_model
from tests.quantization.toy import Toy, toy_layers


@pytest.mark.parametrize("method", METHODS)
def test_full_svds_reach_the_same_error(method):
    chosen = recipe(*METHODS[method])
    if chosen.branch.kind != "none":
        chosen = replace(chosen, branch=replace(chosen.branch, rank=4))
    model, layers = Toy(), toy_layers()
    ours = quantize_model(model, layers, chosen, progress=None)
    with reference_way():
        theirs = quantize_model(model, layers, chosen, progress=None)
    assert len(theirs.info) >= len(ours.info)
    assert weight_error(ours, model) == pytest.approx(weight_error(theirs, model), rel=SAME_ERROR)


def test_the_profile_counts_flops_and_bytes():
    a, b = torch.randn(3, 40, 20), torch.randn(3, 20, 10)
    square = a.mT @ a + torch.eye(20)
    with OperationProfile() as profile:
        torch.bmm(a, b)
        torch.linalg.qr(a)
        torch.linalg.eigh(square)
        torch.linalg.solve(square, torch.ones(3, 20, 5))
        a.view(-1).add(1.0)
    assert profile.flops["bmm"] == 3 * 2 * 40 * 20 * 10
    assert profile.bytes["bmm"] == 4 * 3 * (40 * 20 + 20 * 10 + 40 * 10)
    assert profile.flops["linalg_qr"] == pytest.approx(3 * 4 * (40 * 400 - 20**3 / 3))
    assert profile.flops["_linalg_eigh"] == 3 * 9 * 20**3
    assert profile.flops["_linalg_solve_ex"] == pytest.approx(3 * (2 * 20**3 / 3 + 2 * 400 * 5))
    assert profile.bytes["add"] == 2 * 4 * a.numel() and not profile.flops["add"]
    assert not profile.bytes["view"] and min(profile.seconds.values()) > 0
    kinds = {operation_kind(name) for name in ("bmm", "linalg_qr", "add")}
    assert kinds == {"products", "decompositions", "rounding"}


def test_pairs_have_equal_settings_and_different_images():
    def made(recipe: str, images: str, created: int, names: tuple[str, ...] = ("a", "b")):
        metrics = {
            name: {"value": 1.0, "per_image": [1.0, 1.0 + created]} for name in again.METRICS
        }
        return SimpleNamespace(
            config={"quant": recipe, "data": {"count": 2}}, model_hash="m", metrics=metrics,
            images={"hash": images, "names": list(names)}, created=created,
            row="r", label="", commit="c",
        )  # fmt: skip

    one, two, same = made("rtn", "x", 0), made("rtn", "y", 1), made("lqer", "z", 0)
    others = [same, made("lqer", "z", 2), made("gptq", "p", 0), made("gptq", "q", 3, ("a", "c"))]
    assert again.repeated_pairs([one, two, *others]) == [(one, two)]
    assert again.compare_pair(one, two)["psnr"]["mean"] == 0.5
