"""Transformers whose layers compute something else than their weights say are refused."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import loraq
from loraq.errors import LoraqError
from loraq.models import list_layers
from tests.little import little_pixart, little_sana


@pytest.fixture(scope="module")
def pristine():
    return little_pixart()


@pytest.fixture
def pipe(pristine):
    return copy.deepcopy(pristine)


def lora(pipe):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_k"]), pipe.transformer)


def lora_on_skipped_layers(pipe):
    skipped = LoraConfig(r=2, target_modules=["attn2.to_k", "attn2.to_v"])
    inject_adapter_in_model(skipped, pipe.transformer)


def peft_model(pipe):
    pipe.transformer = get_peft_model(pipe.transformer, LoraConfig(r=2, target_modules=["to_q"]))


class HandmadeLora(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x


def handmade_lora(pipe):
    pipe.transformer.transformer_blocks[0].attn1.to_q.__class__ = HandmadeLora


def patched_forward(pipe):
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    plain = layer.forward
    layer.forward = lambda x: plain(x) + x


def hook(pipe):
    layer = pipe.transformer.transformer_blocks[1].ff.net[2]
    layer.register_forward_hook(lambda _module, _args, output: output * 2)


def fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def compiled(pipe):
    pipe.transformer = torch.compile(pipe.transformer)


def compiled_in_place(pipe):
    pipe.transformer.transformer_blocks[0].compile()


def one_compiled_block(pipe):
    blocks = pipe.transformer.transformer_blocks
    blocks[1] = torch.compile(blocks[1])


def data_parallel(pipe):
    blocks = pipe.transformer.transformer_blocks
    blocks[0] = nn.DataParallel(blocks[0])


def hidden(pipe):
    attention = pipe.transformer.transformer_blocks[1].attn1
    attention.query = attention.to_q
    del attention.to_q


def weight_norm(pipe):
    parametrizations.weight_norm(pipe.transformer.transformer_blocks[0].attn1.to_v)


def pruned(pipe):
    prune.random_unstructured(pipe.transformer.transformer_blocks[0].attn1.to_v, "weight", 0.5)


def one_module_twice(pipe):
    first, second = pipe.transformer.transformer_blocks
    second.attn1.to_q = first.attn1.to_q


def one_weight_twice(pipe):
    first, second = pipe.transformer.transformer_blocks
    second.attn1.to_out[0].weight = first.attn1.to_out[0].weight


def tied_to_a_skipped_layer(pipe):
    block = pipe.transformer.transformer_blocks[0]
    block.attn2.to_k.weight = block.attn1.to_k.weight


def sequential_offload(pipe):
    from accelerate import cpu_offload

    cpu_offload(pipe.transformer, execution_device=torch.device("cpu"))


def group_offload(pipe):
    from diffusers.hooks import apply_group_offloading

    cpu = torch.device("cpu")
    apply_group_offloading(pipe.transformer, cpu, cpu, "leaf_level")


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def float8_weight(pipe):
    layer = pipe.transformer.transformer_blocks[0].attn1.to_q
    layer.weight = nn.Parameter(layer.weight.data.to(torch.float8_e4m3fn), requires_grad=False)


def wider_convolution(pipe):
    feed_forward = pipe.transformer.transformer_blocks[0].ff
    feed_forward.net[2] = nn.Conv2d(256, 64, 3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lora, r"attn1\.to_q' has an adapter .*'fuse'.*'keep'.*unload_lora_weights"),
        (lora_on_skipped_layers, r"attn2\.to_k' has an adapter"),
        (peft_model, "attn1.to_q' has an adapter .*merge_and_unload"),
        (handmade_lora, r"attn1\.to_q' cannot be quantised: it is a HandmadeLora"),
        (patched_forward, r"attn1\.to_q' cannot be quantised: .*forward"),
        (hook, r"1\.ff\.net\.2' cannot be quantised: .*hooks"),
        (fused, r"attn1' has fused projections.*unfuse_qkv_projections"),
        (compiled, "wrapped in OptimizedModule.*then wrap or compile"),
        (compiled_in_place, "blocks.0' was compiled"),
        (one_compiled_block, "blocks.1' is wrapped in OptimizedModule"),
        (data_parallel, "blocks.0' is wrapped in DataParallel"),
        (hidden, "Block 'transformer_blocks.1' has no layer with the role self_q"),
        (weight_norm, "to_v' cannot be quantised: it is a ParametrizedLinear"),
        (pruned, "to_v' cannot be quantised: .*hooks"),
        (one_module_twice, r"0\.attn1\.to_q' and 'transformer_blocks\.1\.attn1\.to_q' share"),
        (one_weight_twice, r"0\.attn1\.to_out\.0' and .*1\.attn1\.to_out\.0' share one weight"),
        (tied_to_a_skipped_layer, r"attn1\.to_k' and .*attn2\.to_k' share one weight"),
        (sequential_offload, "attn1.to_q' cannot be quantised: .*offloading"),
        (group_offload, "attn1.to_q' cannot be quantised: .*offloading"),
        (layerwise_casting, "attn1.to_q' cannot be quantised: .*casting"),
        (float8_weight, "attn1.to_q' cannot be quantised: it has a weight of torch.float8_e4m3fn"),
        (wider_convolution, r"ff\.net\.2' cannot be quantised: it is a convolution other than 1×1"),
    ],
)
def test_layers_that_are_not_plain_are_refused(pipe, change, words):
    change(pipe)
    before = list(pipe.transformer.modules())
    with pytest.raises(LoraqError, match=f"(?s){words}"):
        loraq.quantize(pipe, "rtn", progress=False)
    after = list(pipe.transformer.modules())
    assert all(a is b for a, b in zip(before, after, strict=True))  # nothing was replaced


def test_a_layer_that_is_skipped_may_be_anything(pipe):
    weight_norm(pipe)
    layers = list_layers(pipe.transformer, "pixart_sigma", ("self_v",))
    assert layers and not any(layer.role == "self_v" for layer in layers)


def test_a_merged_adapter_is_quantised_with_the_weights():
    pipe = little_sana()
    name = "transformer_blocks.0.attn1.to_q"
    before = pipe.transformer.get_submodule(name).weight.detach().clone()
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    nn.init.normal_(pipe.transformer.get_submodule(name).lora_B["default"].weight)
    with pytest.raises(LoraqError, match="has an adapter"):
        loraq.quantize(pipe, "rtn", progress=False)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    merged = pipe.transformer.get_submodule(name).weight.detach()
    model = loraq.quantize(pipe, "rtn", progress=False)
    kept = model.layers[name].effective_weight()
    assert (kept - merged).norm() < 0.3 * (before - merged).norm()


class OwnQueryProcessor:
    """An attention processor that computes the query from a weight that it holds."""

    def __init__(self, plain, weight):
        self.plain, self.weight = plain, weight

    def __call__(self, attention, hidden_states, *args, **kwargs):
        layer = attention._modules.pop("to_q")
        attention.__dict__["to_q"] = lambda x: nn.functional.linear(x, self.weight)
        try:
            return self.plain(attention, hidden_states, *args, **kwargs)
        finally:
            del attention.__dict__["to_q"]
            attention._modules["to_q"] = layer


@pytest.mark.parametrize(
    ("copied", "words"),
    [(True, "attn1.to_q', are not used"), (False, "attn1.to_q' still computes")],
)
def test_weights_that_compute_in_place_of_packed_layers_are_noticed(pipe, copied, words):
    attention = pipe.transformer.transformer_blocks[0].attn1
    weight = attention.to_q.weight
    held = weight.detach().clone() if copied else weight
    attention.set_processor(OwnQueryProcessor(attention.processor, held))
    with pytest.raises(LoraqError, match=words):
        loraq.quantize(pipe, "rtn", progress=False)
    assert type(attention.to_q) is nn.Linear  # the 16-bit layers are back


def test_all_layers_of_both_families_compute():
    for made in (little_pixart(), little_sana()):
        loraq.quantize(made, "rtn", progress=False).check_called(made.transformer)
