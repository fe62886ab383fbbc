"""The text is encoded as the pipeline's own call does, whose defaults are not `encode_prompt`'s."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys
from dataclasses import replace

import diffusers
import pytest
import torch

from loraq.compose import load_rows
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models import family_names, load_pipeline
from loraq.models.call import CLEANERS, text_arguments
from loraq.models.family import find_family
from loraq.runner import product_keys
from loraq.runner.embeddings import encode_batch
from loraq.runner.estimate import dry_run
from tests.little import little_config

PROMPTS = [Prompt("p0", "a red cat"), Prompt("p1", "one  Blue <b>fish</b>")]
NEEDS_CLEANERS = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, CLEANERS)), reason="the packages that clean captions"
)


@pytest.mark.parametrize("family", [n for n in family_names() if find_family(n).EMBEDDINGS])
def test_the_family_lists_the_defaults_that_differ(family):
    table = find_family(family)
    pipeline = getattr(diffusers, table.PIPELINES[0])
    call, encode = (
        inspect.signature(function).parameters
        for function in (pipeline.__call__, pipeline.encode_prompt)
    )
    both = call.keys() & encode.keys() - {"self", "prompt"}
    differing = {name for name in both if call[name].default != encode[name].default}
    assert differing == {*table.TEXT_DEFAULTS}


@pytest.mark.parametrize("family", ["sana", pytest.param("pixart_sigma", marks=NEEDS_CLEANERS)])
def test_prompts_are_encoded_with_the_defaults_of_the_call(
    family, sana_folder, tiny_folder, monkeypatch
):
    """SANA's human instruction was left out, and PixArt's captions were not cleaned."""
    folder = sana_folder if family == "sana" else tiny_folder
    call = {"use_resolution_binning": False}
    model = little_config(family=family, path=str(folder), max_sequence_length=24, call=call)
    pipe = load_pipeline(model)
    found, seen = encode_batch(pipe, model, PROMPTS), []
    forward = pipe.transformer.forward

    def note(*args, **kwargs):
        seen.append(kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", note)
    pipe(
        [prompt.prompt for prompt in PROMPTS],
        **{"num_inference_steps": 1, "height": 64, "width": 64, "output_type": "latent"},
        **{"max_sequence_length": 24, "use_resolution_binning": False},
    )
    wanted = torch.cat([found["negative_prompt_embeds"], found["prompt_embeds"]])
    assert torch.equal(seen[0], wanted)
    (name,) = find_family(family).TEXT_DEFAULTS
    bare = encode_batch(pipe, replace(model, call={**call, name: None}), PROMPTS)
    assert not torch.equal(bare["prompt_embeds"], found["prompt_embeds"])


@pytest.mark.parametrize(
    ("name", "cleaned", "instructed"),
    [
        ("pixart_sigma", True, False),
        ("sana_1_6b", False, True),
        ("sana_1_6b_ch5632", False, True),
        ("tiny_pixart", False, False),
        ("tiny_sana", False, False),
    ],
)
def test_the_models_follow_the_reference_or_say_otherwise(name, cleaned, instructed):
    model = load_rows([f"model={name}", "method=rtn"])[-1].model
    found = text_arguments(getattr(diffusers, find_family(model.family).PIPELINES[0]), model)
    assert found["clean_caption"] is cleaned
    assert bool(found.get("complex_human_instruction")) is instructed
    assert model.variant == ("bf16" if instructed else None)


@pytest.mark.parametrize("packages", [["bs4"], ["ftfy"], ["bs4", "ftfy"]])
def test_cleaning_without_its_packages_is_refused_in_the_plan(packages, overrides, monkeypatch):
    """diffusers left the captions as they were, with a message that nobody sees."""
    for module in CLEANERS:
        monkeypatch.setitem(sys.modules, module, None if module in packages else json)
    named = " ".join(CLEANERS[module] for module in packages)
    call = "~model.call.clean_caption"
    for chosen, remedy in ((call, r"\+"), ("model.call.clean_caption=true", "")):
        with pytest.raises(LoraqError, match=rf"pip install {named}\. .*set {remedy}model\.call"):
            dry_run([*overrides, "method=rtn", chosen])
    with pytest.raises(LoraqError, match="pip install"):
        load_pipeline(load_rows([*overrides, "method=rtn", call])[-1].model)
    load_pipeline(load_rows([*overrides, "method=rtn", call])[-1].model, without=("text_encoder",))


def test_keys_hold_the_version_of_defaults_where_the_text_depends_on_them(overrides, monkeypatch):
    explicit = load_rows([*overrides, "method=rtn"])[-1]
    default = load_rows([*overrides, "method=rtn", "~model.call.clean_caption"])[-1]
    before = [product_keys.make_row(config).keys for config in (explicit, default)]
    monkeypatch.setattr(product_keys, "DEFAULTS_VERSION", 99)
    after = [product_keys.make_row(config).keys for config in (explicit, default)]
    assert before[0] == after[0]
    changed = {stage for stage, key in before[1].items() if after[1][stage] != key}
    assert changed == set(before[1]) - {"quantised"}
