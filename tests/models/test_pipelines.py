"""Little pipelines of tests/pipelines: every one generates, and a saved one is the same."""

from __future__ import annotations

import pytest
import torch

from tests import pipelines


def generate(name, pipe):
    """The outputs for two prompts, as one tensor."""
    little = pipelines.settings(name)
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    output = pipe(
        prompt=["a red cat", "one blue dog"],
        num_inference_steps=little.STEPS,
        generator=generators,
        output_type="np",
        **little.CALL,
    )
    return torch.as_tensor(output[0])


@pytest.mark.parametrize("name", pipelines.names())
def test_a_little_pipeline_generates_and_is_the_same_when_loaded(name):
    from diffusers import DiffusionPipeline

    outputs = generate(name, pipelines.build(name))
    assert outputs.isfinite().all()
    assert not torch.equal(outputs[0], outputs[1])
    assert (outputs[0] != outputs[0].flatten()[0]).any()
    loaded = DiffusionPipeline.from_pretrained(pipelines.little_folder(name))
    assert torch.equal(generate(name, loaded), outputs)


def test_both_experts_of_wan_run():
    pipe, ran = pipelines.build("wan"), []
    for part in ("transformer", "transformer_2"):
        getattr(pipe, part).register_forward_hook(lambda *_, part=part: ran.append(part))
    generate("wan", pipe)
    assert ran[0] == "transformer" and ran[-1] == "transformer_2"
