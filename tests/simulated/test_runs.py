"""Whole runs on the simulated device: captures, allocation, images and metrics equal the CPU's."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtSigmaPipeline, PixArtTransformer2DModel

import loraq
from loraq.models.example_inputs import example_inputs
from loraq.runner.experiment import run
from tests.diffusers.test_checkpoints import forward
from tests.settings import small_run
from tests.simulated import simulated_cuda

SMALL = [
    "model.dtype=float32",
    "data.count=1",
    "generate.batch_size=1",  # images of one batch share products, whose bits depend on the batch
    "calibration.prompts=1",
    "calibration.measure_prompts=1",
    "quant.branch.steps=2",
    "metrics.names=[psnr,ssim,lpips]",
]
RANK = ["quant.branch.rank=4", "quant.branch.budget=null"]
ALLOCATED = [
    "quant.branch.budget=2.0",
    "quant.allocation.kind=both",
    "quant.allocation.sensitivity=activations",
]
RUNS = {
    "pixart": ("tiny_folder", ["method=svdquant", "quant.transform.smooth=balanced", *RANK]),
    "pixart, allocated": ("tiny_folder", ["method=loraq_best", *ALLOCATED]),
    "sana": ("sana_folder", ["model=tiny_sana", "method=loraq_random", *RANK]),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_makes_the_images_and_metrics_of_the_cpu(name, request, captions, tmp_path):
    folder, settings = RUNS[name]
    model = request.getfixturevalue(folder)

    def products(device: str) -> tuple[list[bytes], dict[str, float]]:
        output = tmp_path / device
        given = [*settings, *small_run(model, captions, output), *SMALL]
        outcome = run([*given, f"device={device}"], progress=False)
        images = sorted(path.read_bytes() for path in output.rglob("*.png"))
        metrics = outcome.records[-1].metrics
        return images, {name: metric["value"] for name, metric in metrics.items()}

    expected = products("cpu")
    with simulated_cuda() as device:
        found = products("cuda")
    assert found[1] == expected[1] and found[0] == expected[0]
    assert not [key for key in device.waits if key[1].startswith("loraq/layers/")]


@pytest.mark.parametrize("folder", ["tiny_folder", "sana_folder"])
def test_the_second_forward_of_a_model_waits_for_nothing(folder, request):
    """So that a CUDA graph can hold it; nor does it copy anything to the device."""
    with simulated_cuda() as device, torch.inference_mode():
        pipe = DiffusionPipeline.from_pretrained(request.getfixturevalue(folder)).to("cuda")
        loraq.quantize(pipe, loraq.recipe("lqer", *RANK), progress=False)
        inputs = example_inputs(pipe.transformer)
        first = pipe.transformer(**inputs, return_dict=False)[0]
        device.reset()
        second = pipe.transformer(**inputs, return_dict=False)[0]
        assert not device.waits and not device.copies, device.report()
        assert torch.equal(first.cpu(), second.cpu())


def test_checkpoints_on_the_device(tiny_folder, tmp_path):
    """Saved from the device and loaded onto it, packed and dequantised."""
    recipe = loraq.recipe("loraq_o2", "quant.branch.rank=4", "quant.branch.steps=2")
    pipe = PixArtSigmaPipeline.from_pretrained(tiny_folder)
    loraq.quantize(pipe, recipe, progress=False)
    expected = forward(pipe.transformer)
    with simulated_cuda():
        moved = PixArtSigmaPipeline.from_pretrained(tiny_folder).to("cuda")
        loraq.quantize(moved, recipe, progress=False)
        moved.transformer.save_pretrained(tmp_path / "packed")
        loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "packed").to("cuda")
        assert torch.equal(forward(loaded, "cuda").cpu(), expected)
        loaded.dequantize()
        dequantized = forward(loaded, "cuda").cpu()
    here = PixArtTransformer2DModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(forward(here), expected)
    here.dequantize()
    assert torch.equal(forward(here), dequantized)
