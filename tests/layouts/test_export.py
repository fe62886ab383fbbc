"""`loraq export` and `loraq.export`: refusals first, losses said, files read back and measured."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from peft import LoraConfig, inject_adapter_in_model

import loraq
from loraq.cli import main
from loraq.errors import LoraqError
from loraq.formats import quantize
from loraq.layers.linear import QuantizedLinear
from loraq.layouts.importing import load_network
from loraq.layouts.opening import open_checkpoint
from loraq.quantization.peft_layers import register
from loraq.transforms import InputTransform
from tests.diffusers.test_checkpoints import forward
from tests.layouts.layers import difference, packed_layer, packed_source

CALL = {"num_inference_steps": 1, "height": 64, "width": 64, "use_resolution_binning": False}
CALL |= {"clean_caption": False, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def saved(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "packed"
    packed.save_pretrained(folder)
    return folder


def test_a_pipeline_is_exported_with_images_and_all_its_components(packed, tmp_path):
    before = forward(packed.transformer)
    found = loraq.export(
        packed, tmp_path / "out", "comfy-kitchen", prompts=["a red cat"], call=CALL, progress=False
    )
    assert found.captured and len(found.layers) == 16 and max(found.layers.values()) < 0.1
    assert 20 < found.psnr[0] < 100
    assert torch.equal(forward(packed.transformer), before)
    assert all(
        isinstance(packed.transformer.get_submodule(n), QuantizedLinear) for n in found.layers
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"model_index.json", "vae", "text_encoder", "transformer"} <= names
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "the layout `comfy-kitchen`" in card and f"\n- {found.losses[0]}" in card
    assert "bits per weight" not in card and "loraq.diffusers_quantizer" not in card
    network = load_network(tmp_path / "out/transformer")
    pipe = PixArtSigmaPipeline.from_pretrained(tmp_path / "out", transformer=network)
    assert difference(forward(pipe.transformer), before) < 0.1
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]  # no temporary folder stays


def test_the_command_exports_a_saved_transformer(saved, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["export", str(saved / "transformer"), str(out), "--to", "comfy-kitchen", "--quiet"]
    main([*command, "--dry-run"])
    assert "act_unsigned" in (printed := capsys.readouterr().out) and "dry run" in printed
    assert not out.exists()
    main([*command, "--json", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "Outputs of 16 layers on random inputs differ by" in printed and str(out) in printed
    plain = json.loads((tmp_path / "found.json").read_text())
    assert open_checkpoint(saved)._progress_bar_config == {"disable": True}
    assert plain["target"] == "comfy-kitchen" and 0 < max(plain["layers"].values()) < 0.1
    assert load_network(out).transformer_blocks[0].ff.net[2].layer.shift > 0
    main(["export", "--list"])
    assert "comfy-kitchen" in capsys.readouterr().out


def test_every_refused_layer_is_counted_before_anything_is_written(tmp_path):
    signs = torch.ones(128, dtype=torch.int8)
    rotated = replace(packed_layer(), transform=InputTransform(signs_I=signs, block=64))
    layers = {"a": rotated, "b": packed_layer(), "c": rotated, "d": packed_layer(weight="nvfp4")}
    network = packed_source(layers).network
    with pytest.raises(LoraqError) as error:
        loraq.export(network, tmp_path / "out", "comfy-kitchen", progress=False)
    assert "cannot hold 3 of 4 layers; nothing was written" in str(error.value)
    assert "2 of them, such as 'a': its input is rotated, which" in str(error.value)
    assert "1 of them, such as 'd': its weight is nvfp4" in str(error.value)
    with pytest.raises(LoraqError, match="no packed layers"):
        loraq.export(torch.nn.Linear(2, 2), tmp_path / "out", "comfy-kitchen")
    assert list(tmp_path.iterdir()) == []


def test_numbers_out_of_the_range_of_16_bits_are_refused_for_every_layout(tmp_path):
    layer = packed_layer(weight="nvfp4", branch="bf16", rank=0, smooth=False)
    large = replace(layer, bias_O=torch.full((128,), 1e5))
    for target in ("modelopt", "comfyui-nvfp4", "nunchaku_lite"):
        with pytest.raises(LoraqError, match=r"(?s)1 of 1 layers.*bias reach .*dtype=bfloat16"):
            loraq.export(packed_source({"a": large}).network, tmp_path / "out", target)
    wide = replace(layer, bias_O=torch.full((128,), 65500.0))  # 16 bits hold it, but no sum
    steep = replace(wide, weight=quantize(torch.ones(128, 128) * 200, layer.weight.format))
    with pytest.raises(LoraqError, match=r"outputs of 'a' are not finite in torch.float16"):
        loraq.export(packed_source({"a": steep}).network, tmp_path / "out", "modelopt")
    assert list(tmp_path.iterdir()) == []


def test_a_layer_without_16_bit_tensors_is_compared_in_the_type_of_the_export(tmp_path):
    layer = packed_layer(weight="nvfp4", rank=0, smooth=False)
    network = packed_source({"a": replace(layer, bias_O=None)}).network
    half, brain = (
        loraq.export(network, tmp_path / dtype, "comfyui-nvfp4", dtype=dtype, progress=False)
        for dtype in ("float16", "bfloat16")
    )
    assert half.layers["a"] < brain.layers["a"] / 2


def test_an_adapter_is_not_left_out(tmp_path):
    network = packed_source({"a": packed_layer()}).network
    network.dtype = torch.float32  # as networks of diffusers have it
    register()  # as attaching packed layers to such a network does
    inject_adapter_in_model(LoraConfig(target_modules=["a"]), network)
    with pytest.raises(LoraqError, match=r"'a' has an adapter .*unload_lora_weights"):
        loraq.export(network, tmp_path / "out", "comfy-kitchen")


def test_arguments_without_effect_are_refused(packed, tmp_path):
    (tmp_path / "file").touch()
    wrong = {
        "Did you mean 'comfy-kitchen'": {"to": "comfy-kichen"},
        "exists. Give a new folder": {"folder": tmp_path},
        "Unknown dtype of an export 'float32'": {"dtype": "float32"},
        "no effect without prompts": {"call": {"height": 8}},
        "need a pipeline to make images": {"model": packed.transformer, "prompts": ["a"]},
        "is one text, not a list": {"prompts": "a red cat"},
        "argument of PixArtSigmaPipeline 'steps'": {"prompts": ["a"], "call": {"steps": 1}},
        "holds no saved pipeline": {"model": tmp_path},
    }
    for message, changes in wrong.items():
        given = {"model": packed, "folder": tmp_path / "out", "to": "comfy-kitchen"} | changes
        with pytest.raises(LoraqError, match=message):
            loraq.export(**given, progress=False)
    with pytest.raises(SystemExit):
        main(["export", "--to", "comfy-kitchen"])


def test_a_full_disk_is_said_and_leaves_nothing(packed, small_disk):
    with pytest.raises(LoraqError, match="Disk full"):
        loraq.export(packed.transformer, small_disk / "out", "comfy-kitchen", progress=False)
    assert list(small_disk.iterdir()) == []
