"""Which metrics a configuration measures: published ones at full size, proxies only by name."""

from __future__ import annotations

import pytest
import yaml

from loraq.compose import CONF, load_rows
from loraq.config import MetricsConfig
from loraq.config.overrides import config_groups

PUBLISHED = {"frechet", "kid", "lpips", "psnr", "ssim", "clip_score", "image_reward"}
MODELS = sorted({*config_groups()["model"]} - {"hub"})


def of(*overrides: str) -> MetricsConfig:
    found = {row.metrics for row in load_rows(["method=rtn", *overrides])}
    assert len(found) == 1
    return found.pop()


def is_published(metrics: MetricsConfig) -> bool:
    names = set(metrics.names)
    return names >= PUBLISHED and "alignment" not in names and metrics.extractor == "inception"


@pytest.mark.parametrize("model", MODELS)
def test_full_size_models_measure_published_metrics_and_embedded_ones_the_default(model):
    written = yaml.safe_load((CONF / "model" / f"{model}.yaml").read_text())
    if written["hub_id"] is None:
        assert of(f"model={model}") == MetricsConfig()
    elif written["domain"] is None:  # of videos or sound: no network of images
        assert PUBLISHED.isdisjoint({*of(f"model={model}").names} - {"psnr", "ssim", "lpips"})
    else:
        assert is_published(of(f"model={model}"))


def test_the_protocol_measures_published_metrics():
    for row in load_rows(["experiment=protocol"]):
        assert is_published(row.metrics)
    for row in load_rows(["experiment=protocol_small"]):
        assert row.metrics == MetricsConfig()


@pytest.mark.parametrize("place", ["model=pixart_sigma", "experiment=protocol"])
def test_a_users_own_choice_wins(place):
    given = [place] if place.startswith("experiment") else [place, "method=rtn"]
    assert load_rows([*given, "metrics=paired"])[0].metrics == of("metrics=paired")
    own = load_rows([*given, "metrics.names=[psnr,alignment]", "metrics.extractor=efflite0"])[0]
    assert own.metrics == MetricsConfig(("psnr", "alignment"), "efflite0")
