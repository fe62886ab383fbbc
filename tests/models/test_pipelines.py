"""Little pipelines of tests/pipelines: every one generates, and a saved one is the same."""

from __future__ import annotations

import pytest
import torch

from tests import pipelines

PROMPTS = ["a red cat", "one blue dog"]


@pytest.mark.parametrize("name", pipelines.names())
def test_a_little_pipeline_generates_and_is_the_same_when_loaded(name):
    from diffusers import DiffusionPipeline

    outputs = pipelines.generate(pipelines.build(name), name, PROMPTS)
    assert outputs.isfinite().all()
    assert not torch.equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[0].flatten()[0]).any()
    loaded = DiffusionPipeline.from_pretrained(pipelines.little_folder(name))
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pipelines.generate(loaded, name, PROMPTS), outputs)
    other = pipelines.generate(loaded, name, [PROMPTS[0], "one green fish"])
    assert (other[1] - outputs[1]).abs().mean() > 1e-4  # the prompt has an effect


def test_both_experts_of_wan_run():
    pipe, ran = pipelines.build("wan"), []
    for part in ("transformer", "transformer_2"):
        getattr(pipe, part).register_forward_hook(lambda *_, part=part: ran.append(part))
    pipelines.generate(pipe, "wan", PROMPTS)
    assert ran[0] == "transformer" and ran[-1] == "transformer_2"


def test_the_template_of_qwen_image_has_34_tokens():
    """The pipeline drops the first 34: what is left is the prompt and the end of the template."""
    pipe = pipelines.build("qwen_image")
    tokens = pipe.tokenizer(pipe.prompt_template_encode.format("a red cat"))["input_ids"]
    kept = pipe.tokenizer.decode(tokens[pipe.prompt_template_encode_start_idx :])
    assert kept == "a red cat<|im_end|>\n<|im_start|>assistant\n"
