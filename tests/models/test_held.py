"""Memory of a denoiser: what is not a quantised layer is not counted as one."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, get_peft_model

from loraq.errors import LoraqError
from loraq.models.denoisers import device_of
from loraq.models.held import held_memory
from tests.diffusers.test_checkpoints import quantised
from tests.little import little_sana
from tests.simulated import simulated_cuda


@pytest.fixture(scope="module")
def plain():
    return little_sana()


def lora() -> LoraConfig:
    """Of packed layers, and of one that stays in 16 bits."""
    return LoraConfig(r=2, target_modules=["attn1.to_q", "attn2.to_v"], init_lora_weights=False)


def test_an_adapter_belongs_to_the_whole_and_to_no_quantised_layer(plain):
    pipe = copy.deepcopy(plain)
    for quantize in (lambda: None, lambda: quantised(pipe, "rtn")):
        quantize()
        before = held_memory(pipe.transformer)
        pipe.transformer.add_adapter(lora())
        after = held_memory(pipe.transformer)
        assert after.nbytes - before.nbytes == 4 * 4 * 2 * (40 + 40)
        assert after.weights == before.weights
        assert after.quantized_nbytes == before.quantized_nbytes
        assert after.quantized_weights == before.quantized_weights
        pipe.unload_lora_weights()


def test_a_compiled_model_holds_what_it_did(plain):
    assert held_memory(torch.compile(plain.transformer)) == held_memory(plain.transformer)


def test_what_cannot_be_counted_is_refused(plain):
    pipe = copy.deepcopy(plain)
    with pytest.raises(LoraqError, match=r"A PeftModel is no model.*get_base_model\(\)"):
        held_memory(get_peft_model(copy.deepcopy(plain.transformer), lora()))
    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"), offload_buffers=True)
    with pytest.raises(LoraqError, match=r"meta device.*without offloading"):
        held_memory(pipe.transformer)
    assert device_of(pipe) == "cpu"


def test_an_offloaded_denoiser_runs_on_the_gpu(plain):
    pipe = copy.deepcopy(plain)
    with simulated_cuda():
        pipe.enable_model_cpu_offload(device="cuda")
        assert next(pipe.transformer.parameters()).device.type == "cpu" != device_of(pipe)
