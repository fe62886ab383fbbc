"""What a pipeline makes is known from its class, before any weights."""

from __future__ import annotations

import diffusers
import pytest

from loraq.compose import load_rows
from loraq.config.composition import Composer
from loraq.errors import LoraqError
from loraq.metrics.registry import DEFAULTS, names_for
from loraq.models.outputs import check_outputs, frame_rate, kind_of_class, output_kind
from loraq.utils.assets import CONF
from tests.pipelines import little_folder

KINDS = {
    "image": (
        "FluxPipeline",
        "QwenImagePipeline",
        "PixArtSigmaPipeline",
        "StableDiffusionPipeline",
    ),
    "video": ("WanPipeline", "LTXPipeline", "LTX2Pipeline", "CogVideoXPipeline", "MochiPipeline"),
    "audio": ("StableAudioPipeline", "AudioLDM2Pipeline", "StableAudio3Pipeline"),
}


def model(name: str, *more: str):
    overrides = ["model=hub", f"model.path={little_folder(name)}", "method=reference", *more]
    return load_rows(overrides)[0].model


@pytest.mark.parametrize("kind", KINDS)
def test_the_kind_follows_from_the_pipelines_class(kind):
    assert {kind_of_class(getattr(diffusers, name)) for name in KINDS[kind]} == {kind}


@pytest.mark.parametrize("name", ["tiny_pixart", "tiny_sana"])
def test_what_a_family_states_is_what_its_class_says(name):
    found = load_rows([f"model={name}", "method=reference"])[0].model
    pipeline = {"tiny_pixart": "PixArtSigmaPipeline", "tiny_sana": "SanaPipeline"}[name]
    assert output_kind(found) == kind_of_class(getattr(diffusers, pipeline)) == "image"


@pytest.mark.parametrize("kind", DEFAULTS)
def test_automatic_metrics_are_those_of_the_kinds_file(kind):
    written = Composer(CONF).compose([f"metrics={DEFAULTS[kind]}"])["metrics"]["names"]
    assert set(names_for(["auto"], kind)) == set(written)
    assert names_for(["auto", written[0], "kid"], kind)[-1] == "kid"


def test_the_frame_rate_is_the_calls_or_the_settings():
    ltx = model("ltx")
    assert frame_rate(ltx) == (25.0, "model.call.frame_rate") and not check_outputs(ltx)
    assert frame_rate(model("ltx", "+model.call.frame_rate=12")) == (12.0, "model.call.frame_rate")
    with pytest.raises(LoraqError, match=r"fps=8 has no effect. Set model\.call\.frame_rate"):
        check_outputs(model("ltx", "model.fps=8"))
    assert frame_rate(model("wan", "model.fps=24")) == (24.0, "model.fps")
    assert "16 frames per second. Set model.fps" in check_outputs(model("wan"))[0]
    with pytest.raises(LoraqError, match="The model makes clips"):
        check_outputs(model("stable_audio", "model.fps=24"))
