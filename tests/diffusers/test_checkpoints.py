"""Packed checkpoints: saved and loaded with diffusers, the model is bitwise the same."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel, SanaTransformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file, save_file

import loraq
from loraq.diffusers_quantizer import LoRaQConfig, packed_layers
from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.quantization.diffusers_config import PackedConfig
from loraq.quantization.diffusers_packed import PackedQuantizer
from tests.forked import start

RANK = "quant.branch.rank=4"
RECIPES = {
    "rtn": ("rtn",),
    "int4 / int8": ("loraq_o2", RANK),
    "int4 / int4, rotated, balanced": (
        "loraq_best",
        RANK,
        "quant.transform.hadamard=16",
    ),
    "int4 / 16 bits, shifted": (
        "lqer",
        RANK,
        "quant.transform.shift=true",
        "format@quant.branch_weight=fp16",
        "format@quant.branch_activation=fp16",
    ),
    "mxfp4 / mxfp6": (
        "loraq_o2",
        RANK,
        "format@quant.weight=mxfp4_e2m1",
        "format@quant.activation=mxfp4_e2m1",
        "format@quant.branch_weight=mxfp6_e2m3",
        "format@quant.branch_activation=mxfp6_e2m3",
    ),
    "nvfp4 / int6": (
        "loraq_o2",
        RANK,
        "format@quant.weight=nvfp4",
        "format@quant.activation=nvfp4",
        "format@quant.branch_weight=int6",
        "format@quant.branch_activation=int6",
    ),
    "int8 a tensor, separate": (
        "loraq_o2",
        RANK,
        "quant.branch.share_qkv=false",
        "format@quant.weight=int8",
        "quant.weight.block=-1",
    ),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


def forward(transformer, device: str = "cpu") -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    width = transformer.config.caption_channels
    extra = {}
    if isinstance(transformer, PixArtTransformer2DModel):
        extra = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    with torch.no_grad():
        return transformer(
            torch.randn(2, 4, 8, 8, generator=g).to(device),
            encoder_hidden_states=torch.randn(2, 5, width, generator=g).to(device),
            timestep=torch.tensor([10.0, 700.0], device=device),
            encoder_attention_mask=torch.ones(2, 5, device=device),
            return_dict=False,
            **extra,
        )[0]


@pytest.fixture
def pipe(tiny_folder):
    return PixArtSigmaPipeline.from_pretrained(tiny_folder)


def quantised(pipe, *recipe: str):
    return loraq.quantize(pipe, loraq.recipe(*recipe), progress=False)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_saved_and_loaded_is_the_same_model_in_the_stated_bytes(pipe, tmp_path, recipe):
    made = quantised(pipe, *recipe)
    before = forward(pipe.transformer)
    pipe.transformer.save_pretrained(tmp_path / "net")
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path / "net")
    assert torch.equal(forward(loaded), before)
    again = packed_layers(loaded)
    assert (again.nbytes, again.ranks) == (made.nbytes, made.ranks)
    tensors = load_file(tmp_path / "net" / WEIGHTS)
    packed = {n: t for n, t in tensors.items() if n.rpartition(".")[0] in made.layers}
    stored = sum(t.nbytes for n, t in packed.items() if not n.endswith(".bias"))
    assert stored == made.nbytes
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "net" / WEIGHTS).read_bytes()


def test_a_pipeline_is_loaded_by_a_process_that_has_no_16_bit_weights(pipe, tmp_path):
    quantised(pipe, *RECIPES["int4 / int4, rotated, balanced"])
    pipe.save_pretrained(tmp_path / "pipe")
    torch.save(forward(pipe.transformer), tmp_path / "expected.pt")
    code = (
        "import sys, torch, loraq.diffusers_quantizer\n"
        "from diffusers import PixArtSigmaPipeline\n"
        "from tests.diffusers.test_checkpoints import forward\n"
        "pipe = PixArtSigmaPipeline.from_pretrained(sys.argv[1])\n"
        "same = torch.equal(forward(pipe.transformer), torch.load(sys.argv[2]))\n"
        "print('same' if same else 'different')"
    )
    printed = tmp_path / "printed"
    process = start(code, tmp_path / "pipe", tmp_path / "expected.pt", output=printed)
    process.join()
    assert printed.read_text().split()[-1] == "same"


def test_shards_device_maps_and_types(pipe, tmp_path):
    quantised(pipe, *RECIPES["int4 / int8"])
    before = forward(pipe.transformer)
    pipe.transformer.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for settings in ({}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}):
        assert torch.equal(
            forward(PixArtTransformer2DModel.from_pretrained(tmp_path, **settings)), before
        )
    half = PixArtTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    layer = half.transformer_blocks[0].attn1.to_q
    assert (
        layer.weight_scale.dtype == torch.float16 and half.proj_out.weight.dtype == torch.bfloat16
    )
    with pytest.raises(LoraqError, match="disk"):
        PixArtTransformer2DModel.from_pretrained(
            tmp_path, device_map={"": "disk"}, offload_folder=tmp_path / "off"
        )
    with pytest.raises(ValueError, match="Casting a quantized model"):
        half.to(torch.float16)


def test_moving_keeps_types_and_values(pipe):
    made = quantised(pipe, *RECIPES["int4 / int4, rotated, balanced"])
    before = forward(pipe.transformer)
    layer = pipe.transformer.transformer_blocks[0].ff.net[2]
    torch.nn.Module.double(pipe.transformer)  # what ModelMixin refuses, to see that codes stay
    assert layer.weight_scale.dtype == torch.float16 and layer.bias.dtype == torch.float32
    torch.nn.Module.float(pipe.transformer)
    assert torch.equal(forward(pipe.transformer), before)
    assert packed_layers(pipe.transformer).nbytes == made.nbytes  # a shared R counts once
    attention = pipe.transformer.transformer_blocks[0].attn1
    before = attention.to_q.right_codes.data_ptr()
    pipe.transformer._apply(lambda tensor: tensor.clone())  # as a move to another device does
    places = {layer.right_codes.data_ptr() for layer in (attention.to_q, attention.to_k)}
    assert len(places) == 1 and before not in places  # one tensor there as well


def test_16_bit_weights_are_quantised_while_they_are_loaded(pipe, tiny_folder):
    chosen = "loraq_o2", RANK
    quantised(pipe, *chosen)
    folder = tiny_folder / "transformer"
    loaded = PixArtTransformer2DModel.from_pretrained(
        folder, quantization_config=LoRaQConfig(*chosen)
    )
    assert torch.equal(forward(loaded), forward(pipe.transformer))
    given = LoRaQConfig(*chosen)
    assert LoRaQConfig.from_dict(given.to_dict()) == given != LoRaQConfig("rtn")
    with pytest.raises(LoraqError, match="names no method"):
        PixArtTransformer2DModel.from_pretrained(folder, quantization_config=LoRaQConfig())
    with pytest.raises(LoraqError, match="reads activations"):
        PixArtTransformer2DModel.from_pretrained(
            folder, quantization_config=LoRaQConfig("svdquant")
        )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("pos_embed.proj.bias", None, "has no tensor 'pos_embed.proj.bias'"),
        ("pos_embed.proj.bias", torch.nan, "pos_embed.proj.bias': 64 of 64 values are NaN"),
    ],
)
def test_16_bit_weights_that_are_not_whole_are_not_quantised(
    tiny_folder, tmp_path, name, value, words
):
    shutil.copytree(tiny_folder / "transformer", tmp_path / "net")
    tensors = load_file(tmp_path / "net" / WEIGHTS)
    held = tensors.pop(name)
    if value is not None:
        tensors[name] = held.fill_(value)
    save_file(tensors, tmp_path / "net" / WEIGHTS, {"format": "pt"})
    with pytest.raises(LoraqError, match=words):
        PixArtTransformer2DModel.from_pretrained(
            tmp_path / "net", quantization_config=LoRaQConfig("rtn")
        )


def test_dequantising_gives_plain_layers_with_the_effective_weights(pipe, tmp_path):
    sixteen = "format@quant.activation=fp16", "format@quant.branch_activation=fp16"
    quantised(pipe, "loraq_o2", RANK, *sixteen)
    before = forward(pipe.transformer)
    plain = pipe.transformer.dequantize()
    assert type(plain.transformer_blocks[0].ff.net[2]) is torch.nn.Linear
    assert (forward(plain) - before).norm() < 5e-3 * before.norm()
    plain.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(forward(PixArtTransformer2DModel.from_pretrained(tmp_path)), forward(plain))


def test_a_plain_layer_takes_the_shift_back_into_its_bias(pipe):
    made = quantised(pipe, "lqer", RANK, "quant.transform.shift=true")
    tensors = made.layers["transformer_blocks.1.ff.net.2"]
    shift, x = tensors.transform.shift, torch.randn(3, 256)
    expected = (x + shift) @ tensors.effective_weight().T + tensors.bias_O
    layer = tensors.dequantized_module(convolution=False, dtype=torch.float32)
    assert shift > 0 and torch.allclose(layer(x), expected, atol=1e-5)


def test_load_state_dict_replaces_packed_weights(pipe):
    """load_state_dict from another model of the same layout, before and after a forward."""
    chosen = RECIPES["int4 / int4, rotated, balanced"]
    quantised(pipe, *chosen)
    net, other = pipe.transformer, copy.deepcopy(pipe.transformer)
    with torch.no_grad():
        for module in other.modules():
            if isinstance(module, QuantizedLinear):
                module.weight_scale *= 1.5
                module.transform_signs ^= 255
    for assign in (False, True):
        target = copy.deepcopy(net)
        forward(target)
        target.load_state_dict(other.state_dict(), assign=assign)
        assert not torch.equal(forward(target), forward(net))
        fresh = copy.deepcopy(other)
        fresh.load_state_dict(other.state_dict())
        assert torch.equal(forward(target), forward(fresh))


def test_pickles_and_copies_hold_no_dequantised_weight(pipe):
    quantised(pipe, *RECIPES["int4 / int8"])
    before = len(pickle.dumps(pipe.transformer))
    values = forward(pipe.transformer)
    assert len(pickle.dumps(pipe.transformer)) == before
    assert torch.equal(forward(copy.deepcopy(pipe.transformer)), values)


def test_a_quantised_model_is_neither_quantised_nor_reverted_again(pipe, tmp_path):
    made = quantised(pipe, "rtn")
    with pytest.raises(LoraqError, match="quantised already"):
        quantised(pipe, "rtn")
    with pytest.raises(LoraqError, match="quantised already"):
        made.apply(pipe.transformer)
    pipe.transformer.save_pretrained(tmp_path)
    loaded = PixArtTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(LoraqError, match="no 16-bit layers to restore"):
        packed_layers(loaded).revert(loaded)
    assert loaded.config.quantization_config == pipe.transformer.config.quantization_config


def test_the_graph_has_no_breaks(pipe):
    quantised(pipe, *RECIPES["int4 / int8"])
    attention = pipe.transformer.transformer_blocks[0].attn1
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["attn1.to_q"]), pipe.transformer)
    x = torch.randn(2, 6, 64)
    with torch.no_grad():
        compiled = torch.compile(attention, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), attention(x))


def test_revert_removes_the_quantization_config(pipe, tmp_path):
    before = forward(pipe.transformer)
    made = quantised(pipe, "rtn")
    made.revert(pipe.transformer)
    assert torch.equal(forward(pipe.transformer), before)
    pipe.transformer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


@pytest.fixture(scope="module")
def saved_once(tiny_folder, tmp_path_factory) -> Path:
    pipe = PixArtSigmaPipeline.from_pretrained(tiny_folder)
    quantised(pipe, "loraq_o2", RANK)
    folder = tmp_path_factory.mktemp("saved") / "net"
    pipe.transformer.save_pretrained(folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(saved_once, tmp_path / "net")


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def rename(layers: dict, old: str, new: str) -> None:
    layers[new] = layers.pop(old)


Q = "transformer_blocks.0.attn1.to_q"
BAD_CONFIGS = {
    "key": (lambda c: c["layers"][Q].pop("transform"), "entry of .* is incomplete"),
    "list": (lambda c: c["layers"].update({Q: []}), "entry of .* is incomplete"),
    "layers in a list": (lambda c: c.update(layers=[1]), "'layers' is not an object"),
    "gone": (lambda c: c["layers"].pop(Q), "to_q.weight"),
    "nothing": (lambda c: (c.pop("formats"), c.pop("layers")), "no packed layers"),
    "version": (lambda c: c.update(version="99"), "layout version '99'"),
    "entry": (lambda c: c.update(layer={}), "Did you mean 'layers'"),
    "no formats": (lambda c: c.pop("formats"), "only one of"),
    "layer": (lambda c: rename(c["layers"], Q, Q + "x"), "does not have"),
    "shape": (lambda c: c["layers"][Q]["weight"].update(shape=[64, 32]), "do not fit each other"),
    "rank": (lambda c: c["layers"][Q]["left"].update(shape=[64, 8]), "do not fit each other"),
}


@pytest.mark.parametrize(("change", "message"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_a_config_that_disagrees_is_refused(saved, change, message):
    edit(saved, change)
    with pytest.raises(LoraqError, match=message):
        PixArtTransformer2DModel.from_pretrained(saved)


def test_a_foreign_method_is_refused(saved):
    with pytest.raises(LoraqError, match="is not supported here"):
        LoRaQConfig(quant_method="bitsandbytes")
    edit(saved, lambda c: c.update(quant_method="lorax"))
    with pytest.raises(ValueError, match=r"lorax.*loraq"):
        PixArtTransformer2DModel.from_pretrained(saved)


def test_missing_tensors_wrong_types_and_truncated_files_are_refused(saved):
    tensors = load_file(saved / WEIGHTS)
    gone = {n: t for n, t in tensors.items() if n != f"{Q}.right_codes"}
    save_file(gone, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LoraqError, match=r"no tensor .*to_q.right_codes"):
        PixArtTransformer2DModel.from_pretrained(saved)
    wide = tensors | {f"{Q}.weight_scale": tensors[f"{Q}.weight_scale"].float()}
    save_file(wide, saved / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(LoraqError, match="float32"):
        PixArtTransformer2DModel.from_pretrained(saved)
    save_file(tensors, saved / WEIGHTS, metadata={"format": "pt"})
    whole = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception, match=r"(?i)safetensors|unable|incomplete|metadata"):
        PixArtTransformer2DModel.from_pretrained(saved)


def test_sana_keeps_its_convolutions(tmp_path):
    torch.manual_seed(0)
    transformer = SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=5, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=5, cross_attention_head_dim=8, cross_attention_dim=40,
        caption_channels=32, mlp_ratio=2.5, sample_size=8, patch_size=1,
    ).eval()  # fmt: skip
    transformer.save_pretrained(tmp_path / "plain")
    loaded = SanaTransformer2DModel.from_pretrained(
        tmp_path / "plain", quantization_config=LoRaQConfig("loraq_o2", RANK)
    )
    assert loaded.transformer_blocks[0].ff.conv_inverted.convolution
    loaded.save_pretrained(tmp_path / "packed")
    again = SanaTransformer2DModel.from_pretrained(tmp_path / "packed")
    assert torch.equal(forward(again), forward(loaded))
    loaded.dequantize()
    assert isinstance(loaded.transformer_blocks[0].ff.conv_inverted, torch.nn.Conv2d)


def test_a_method_is_refused_where_only_loading_packed_layers_is_known():
    """As if a quantised model was applied and `loraq.diffusers_quantizer` was never imported."""
    config = PackedConfig(method="rtn")
    quantizer = PackedQuantizer(config)
    with pytest.raises(LoraqError, match=r"import loraq\.diffusers_quantizer"):
        quantizer.preprocess_model(torch.nn.Linear(2, 2), device_map=None)
