"""LoRA on packed layers, and LoRA that was loaded before quantising."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel
from peft import (
    LoHaConfig,
    LoraConfig,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from torch.nn.functional import conv2d, linear

import loraq
from loraq.diffusers_quantizer import packed_layers
from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from tests.diffusers.test_checkpoints import forward, quantised
from tests.little import little_sana

TARGETS = ("attn1.to_q", "attn1.to_k", "ff.conv_inverted", "attn2.to_v")  # the last is not packed
Q = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def plain():
    return little_sana()


@pytest.fixture(scope="module")
def packed_once(plain):
    pipe = copy.deepcopy(plain)
    quantised(pipe, "rtn")
    return pipe


@pytest.fixture
def packed(packed_once):
    return copy.deepcopy(packed_once)


@pytest.fixture(scope="module")
def loras(plain):
    """Two adapters as diffusers reads them from files."""
    made = []
    for seed, rank in enumerate((4, 2)):
        torch.manual_seed(seed)
        network = copy.deepcopy(plain.transformer)
        network.add_adapter(config(rank, lora_alpha=2 * rank))
        state = get_peft_model_state_dict(network)
        made.append({f"transformer.{name}": tensor for name, tensor in state.items()})
    return made


def config(rank: int = 2, **settings) -> LoraConfig:
    return LoraConfig(
        **{"r": rank, "target_modules": [*TARGETS], "init_lora_weights": False, **settings}
    )


def load(pipe, loras) -> None:
    pipe.load_lora_weights(loras[0], adapter_name="one")
    pipe.load_lora_weights(loras[1], adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, -1.0])


def test_lora_on_packed_layers_is_added_exactly_and_removed(packed, loras):
    before = forward(packed.transformer)
    load(packed, loras)
    assert not torch.equal(forward(packed.transformer), before)
    for name, module in packed.transformer.named_modules():
        packed_layer = getattr(module, "base_layer", None)
        if isinstance(packed_layer, QuantizedLinear):
            width = packed_layer.in_features
            convolution = packed_layer.convolution
            x = torch.randn(2, width, 3, 3) if convolution else torch.randn(2, 5, width)
            product = conv2d if convolution else linear
            expected = packed_layer(x)
            for lora, weight in zip(loras, (0.5, -1.0), strict=True):
                down, up = (lora[f"transformer.{name}.lora_{part}.weight"] for part in "AB")
                expected = expected + product(product(x, down), up) * weight
            assert torch.equal(module(x), expected)
    packed.delete_adapters("two")
    packed.disable_lora()
    assert torch.equal(forward(packed.transformer), before)
    packed.unload_lora_weights()
    assert torch.equal(forward(packed.transformer), before)
    assert isinstance(packed.transformer.get_submodule(Q), QuantizedLinear)


def test_a_loaded_checkpoint_takes_lora_in_the_model_s_type(packed, loras, tmp_path):
    packed.transformer.save_pretrained(tmp_path)
    packed.transformer = SanaTransformer2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    packed.load_lora_weights(loras[0], adapter_name="one")
    layer = packed.transformer.get_submodule(Q)
    assert layer.lora_A["one"].weight.dtype == layer.lora_B["one"].weight.dtype == torch.bfloat16
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
    sizes = packed_layers(packed).adapters
    assert sizes == {"one": 2 * sum(tensor.numel() for tensor in loras[0].values())}
    with pytest.raises(LoraqError, match="cannot be fused"):
        packed.fuse_lora()


def test_adapters_of_linear_layers_are_swapped_while_they_are_loaded(packed, loras):
    linear = [{name: v for name, v in lora.items() if "conv" not in name} for lora in loras]
    once = copy.deepcopy(packed)
    once.load_lora_weights(linear[1])
    packed.enable_lora_hotswap(target_rank=4)
    packed.load_lora_weights(linear[0], adapter_name="one")
    packed.load_lora_weights(linear[1], adapter_name="one", hotswap=True)
    torch.testing.assert_close(forward(packed.transformer), forward(once.transformer))


def test_what_would_lose_a_loaded_adapter_is_refused(packed, loras, tmp_path):
    packed.load_lora_weights(loras[0])
    kept = packed.transformer.transformer_blocks[0].attn2.to_v  # 16 bits
    weight = kept.base_layer.weight.clone()
    for lose, words in (
        (packed.fuse_lora, "cannot be fused .*adapters='fuse'"),
        (packed.transformer.get_submodule(Q).merge, "cannot be fused"),
        (lambda: packed.save_pretrained(tmp_path), "checkpoint cannot hold.*unload_lora_weights"),
        (packed.transformer.dequantize, r"dequantize\(\) would remove.*unload_lora_weights"),
        (lambda: packed_layers(packed).apply(packed), "packed layers would replace"),
    ):
        with pytest.raises(LoraqError, match=f"(?s){words}"):
            lose()
    assert torch.equal(kept.base_layer.weight, weight) and not kept.merged


def test_a_peft_model_around_packed_layers_is_not_merged(packed):
    before = forward(packed.transformer)
    wrapped = get_peft_model(packed.transformer, config())
    with pytest.raises(LoraqError, match="cannot be fused"):
        wrapped.merge_and_unload()
    assert torch.equal(forward(wrapped.unload()), before)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dora": True}, "use_dora .*DoRA"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"init_lora_weights": "orthogonal"}, "'orthogonal' reads or changes"),
    ],
)
def test_lora_that_needs_the_weights_is_refused(packed, settings, words):
    before = [type(module) for module in packed.transformer.modules()]
    with pytest.raises(LoraqError, match=f"{words}.*adapters='fuse'"):
        inject_adapter_in_model(config(**settings), packed.transformer)
    assert [type(module) for module in packed.transformer.modules()] == before


def test_a_part_of_packed_layers_alone_is_refused(packed):
    part = packed.transformer.transformer_blocks[0].attn1
    with pytest.raises(LoraqError, match=r"Attention has no parameters.*the whole transformer"):
        inject_adapter_in_model(config(target_modules=["to_q"]), part)
    chosen = config(target_modules=r"transformer_blocks\.0\.attn1\.to_q")
    inject_adapter_in_model(chosen, packed.transformer)
    assert packed_layers(packed).adapters == {"default": 4 * 2 * (40 + 40)}


def test_adapters_of_another_kind_are_counted_too(packed):
    inject_adapter_in_model(LoHaConfig(r=2, target_modules=["attn2.to_v"]), packed.transformer)
    of_one_layer = 2 * 2 * (40 + 40)  # two products of two matrices
    assert packed_layers(packed).adapters == {"default": 4 * 2 * of_one_layer}


def test_the_loader_of_flux_takes_packed_layers():
    from tests.pipelines.flux import pipeline

    pipe = pipeline()
    torch.manual_seed(0)
    network = copy.deepcopy(pipe.transformer)
    network.add_adapter(config(target_modules=["attn.to_q", "proj_mlp", "x_embedder"]))
    state = get_peft_model_state_dict(network)
    quantised(pipe, "rtn")
    pipe.load_lora_weights({f"transformer.{name}": tensor for name, tensor in state.items()})
    pipe.load_lora_weights({f"transformer.{name}": tensor for name, tensor in state.items()})
    layer = pipe.transformer.transformer_blocks[0].attn.to_q
    assert isinstance(layer.base_layer, QuantizedLinear)
    loaded = get_peft_model_state_dict(pipe.transformer, adapter_name="default_1")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_fused_adapters_are_quantised_with_the_weights(plain, loras):
    by_hand, fused = copy.deepcopy(plain), copy.deepcopy(plain)
    load(by_hand, loras)
    by_hand.fuse_lora()
    by_hand.unload_lora_weights()
    quantised(by_hand, "rtn")
    load(fused, loras)
    with pytest.raises(LoraqError, match="reads activations"):
        loraq.quantize(fused, "svdquant", adapters="fuse", progress=False)
    assert not fused.transformer.get_submodule(Q).merged  # refused before anything changed
    model = loraq.quantize(fused, "rtn", adapters="fuse", progress=False)
    assert torch.equal(forward(fused.transformer), forward(by_hand.transformer))
    assert model.adapters == {}
    load(fused, loras)  # a fused pipeline takes adapters again


def test_kept_adapters_stay_beside_the_packed_layers(plain, packed, loras):
    kept = copy.deepcopy(plain)
    load(kept, loras)
    model = loraq.quantize(kept, "rtn", adapters="keep", progress=False)
    with pytest.raises(LoraqError, match="16-bit layers would replace"):
        model.revert(kept)
    without = forward(packed.transformer)
    load(packed, loras)
    assert torch.equal(forward(kept.transformer), forward(packed.transformer))
    assert model.adapters == packed_layers(packed).adapters and "LoRA 'two'" in repr(model)
    kept.unload_lora_weights()
    assert torch.equal(forward(kept.transformer), without)
    model.revert(kept)
    assert torch.equal(forward(kept.transformer), forward(plain.transformer))


def wrap(pipe):
    pipe.transformer = get_peft_model(pipe.transformer, config())


@pytest.mark.parametrize(
    ("choice", "change", "words"),
    [
        ("keep", lambda pipe: None, "has no effect.*load_lora_weights"),
        ("fused", lambda pipe: None, "Did you mean 'fuse'"),
        ("fuse", wrap, "PeftModel.*merge_and_unload"),
        ("fuse", lambda pipe: add(pipe).set_adapter("a"), "'b' is loaded but not active"),
        ("fuse", lambda pipe: add(pipe).disable_adapters(), "'a' is loaded but not active"),
        ("keep", lambda pipe: add(pipe).fuse_lora(), "fused already.*unfuse_lora"),
        ("keep", lambda pipe: add(pipe, use_dora=True), "DoRA.*adapters='fuse'"),
    ],
)
def test_a_choice_that_does_not_fit_the_adapters_is_refused(plain, choice, change, words):
    pipe = copy.deepcopy(plain)
    change(pipe)
    before = [type(module) for module in pipe.transformer.modules()]
    with pytest.raises(LoraqError, match=f"(?s){words}"):
        loraq.quantize(pipe, "rtn", adapters=choice, progress=False)
    assert [type(module) for module in pipe.transformer.modules()] == before


def add(pipe, **settings):
    for name in "ab":
        pipe.transformer.add_adapter(config(**settings), name)
    return pipe.transformer


def test_groups_that_were_made_without_the_adapter_are_not_taken_for_those_with_it(
    plain, loras, tmp_path
):
    pipe = copy.deepcopy(plain)
    loraq.quantize(pipe, "rtn", checkpoint_dir=tmp_path, progress=False).revert(pipe)
    load(pipe, loras)
    with pytest.raises(LoraqError, match="checkpoint_dir"):
        loraq.quantize(pipe, "rtn", checkpoint_dir=tmp_path, adapters="fuse", progress=False)
