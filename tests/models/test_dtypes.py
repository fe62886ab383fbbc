"""Each network of a pipeline runs in a dtype that it is known to work in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from loraq.compose import load_rows
from loraq.config import ModelConfig
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models import load_pipeline
from loraq.models.dtypes import network_dtypes, text_casts
from loraq.models.families import pixart_sigma
from loraq.runner.embeddings import encode_batch
from loraq.runner.generate import image_batch
from loraq.runner.product_keys import make_row
from loraq.runner.recording import Recording
from tests.little import little_config

PUBLISHED = Path(__file__).parents[1] / "published"
PROMPTS = [Prompt("p0", "a red cat"), Prompt("p1", "one")]
UPCAST = {"vae": "float32"}
LANGUAGE_MODEL = {"text_encoder": "bfloat16"}
IN_FLOAT16 = {
    "flux_1_dev": UPCAST,
    "flux_2_dev": LANGUAGE_MODEL,
    "ltx_video": {},
    "pixart_alpha": UPCAST,
    "qwen_image": LANGUAGE_MODEL,
    "sana_sprint_1_6b": LANGUAGE_MODEL | UPCAST,
    "sd3_5_large": UPCAST,
    "stable_audio_open": {},
    "wan_2_2_t2v_a14b": UPCAST,
    "z_image_turbo": LANGUAGE_MODEL | UPCAST,
}


def published(name: str, **settings: object) -> ModelConfig:
    return little_config(family="generic", path=str(PUBLISHED / name), **settings)


@pytest.mark.parametrize("name", sorted(IN_FLOAT16))
def test_published_models_run_in_types_in_which_they_work(name):
    assert network_dtypes(published(name, dtype="float16")) == IN_FLOAT16[name]
    wan = {"vae": "float32"} if name.startswith("wan") else {}
    assert network_dtypes(published(name, dtype="bfloat16")) == wan
    assert network_dtypes(published(name, dtype="float32")) == {}


@pytest.mark.parametrize(
    ("family", "name"), [("pixart_sigma", "pixart_sigma"), ("sana", "sana_1_6b")]
)
def test_the_first_families_stay_in_one_type(family, name):
    model = published(name, dtype="float16")
    assert network_dtypes(model) != {}
    assert network_dtypes(replace(model, family=family)) == {}


def test_a_setting_replaces_the_rule():
    model = published("z_image_turbo", dtype="float16", dtypes={"vae": "float16"})
    assert network_dtypes(model) == LANGUAGE_MODEL
    given = replace(model, dtypes={"text_encoder": "float32"})
    assert network_dtypes(given) == UPCAST | {"text_encoder": "float32"}


@pytest.mark.parametrize(
    ("dtypes", "message"),
    [
        ({"vea": "float32"}, r"model\.dtypes: .*'vea'.*vae"),
        ({"scheduler": "float32"}, r"model\.dtypes: .*'scheduler'"),
        ({"transformer": "float32"}, r"dtypes\.transformer=float32: set model\.dtype, the den"),
        ({"vae": "float8"}, r"model\.dtypes\.vae: .*'float8'"),
    ],
)
def test_unknown_networks_and_types_are_refused(dtypes, message):
    with pytest.raises(LoraqError, match=message):
        network_dtypes(published("flux_1_dev", dtypes=dtypes))


def test_the_layers_of_t5_that_exceed_float16_stay_in_float32(tiny_folder):
    pipe = load_pipeline(little_config(path=str(tiny_folder), dtype="float16"))
    held = {name: tensor.dtype for name, tensor in pipe.text_encoder.named_parameters()}
    wide = {name for name, dtype in held.items() if dtype == torch.float32}
    assert wide == {name for name in held if name.endswith("DenseReluDense.wo.weight")} != set()


@pytest.mark.parametrize("recorded", [False, True], ids=["named", "recorded"])
def test_a_text_encoder_and_a_decoder_of_another_type_work_with_the_denoiser(
    recorded, tiny_folder, monkeypatch
):
    if recorded:
        monkeypatch.setattr(pixart_sigma, "EMBEDDINGS", ())
    dtypes = {"text_encoder": "float32", "vae": "float32"}
    model = little_config(path=str(tiny_folder), dtype="bfloat16", dtypes=dtypes)
    pipe, seen = load_pipeline(model), []
    assert (pipe.transformer.dtype, pipe.text_encoder.dtype, pipe.vae.dtype) == (
        torch.bfloat16,
        torch.float32,
        torch.float32,
    )
    text = encode_batch(pipe, model, PROMPTS)
    tensors = text.tensors if isinstance(text, Recording) else text
    kinds = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    assert kinds == {torch.bfloat16} and isinstance(text, Recording) is recorded
    pipe.register_modules(text_encoder=None)  # as when images are made
    pipe.vae.decoder.register_forward_hook(lambda _m, x, y: seen.append((x[0].dtype, y.dtype)))
    images = image_batch(pipe, model, PROMPTS, 0, "pt", text)
    assert len(images) == 2 and set(seen) == {(torch.float32, torch.float32)}


def test_keys_hold_types_only_where_they_differ(overrides):
    def keys(*settings: str) -> dict[str, str]:
        return make_row(load_rows(["method=rtn", *overrides, *settings])[-1]).keys

    plain, same = keys(), keys("+model.dtypes={vae:float32}")
    assert plain == same
    other = keys("model.dtype=bfloat16")
    wide = keys("model.dtype=bfloat16", "+model.dtypes={vae:float32}")
    changed = {stage for stage in wide if wide[stage] != other[stage]}
    assert "quantised" not in changed and {"images", "embeddings", "record"} <= changed
    model = load_rows(["method=rtn", *overrides, "+model.dtypes={vae:bfloat16}"])[-1].model
    assert text_casts(model) == {}
