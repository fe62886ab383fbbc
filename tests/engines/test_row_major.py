"""Row-major files against what reads them: ModelOpt 0.47.0, comfy-kitchen 0.2.40 and sdnq 0.2.8."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from loraq.formats import dequantize, get_format
from loraq.layouts.engine_linear import EngineLinear, round_activation
from loraq.layouts.files import WEIGHTS
from loraq.layouts.importing import load_network
from loraq.layouts.scale_tiles import to_tiles
from loraq.layouts.targets import Source, find_target
from tests.layouts.layers import difference, packed_layer, packed_source, rows
from tests.layouts.test_row_major import mxfp8, nvfp4, rotated

pytestmark = pytest.mark.engines


def written(folder, name, layer, dtype=torch.bfloat16):
    """The tensors of one exported layer by suffix, and what is read again."""
    find_target(name).write(packed_source({"a": layer}, dtype), folder)
    tensors = load_file(folder / WEIGHTS)
    held = {n.removeprefix("a."): t for n, t in tensors.items() if n.startswith("a.")}
    return held, find_target(name).read(folder).layers["a"]


def test_modelopt_decodes_our_weight(tmp_path):
    tensor = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    layer = nvfp4(out=48, width=96)
    held, _ = written(tmp_path, "modelopt", layer)
    weight = tensor.NVFP4QTensor(torch.Size((48, 96)), torch.float32, held["weight"])
    scales = {"scale": held["weight_scale"], "double_scale": held["weight_scale_2"]}
    found = weight.dequantize(**scales, block_sizes={-1: 16})
    assert torch.equal(found, dequantize(layer.weight))


def test_modelopt_s_own_conversion_of_the_configuration_is_ours(tmp_path):
    import json

    convert = pytest.importorskip("modelopt.torch.export.convert_hf_config")
    for layer in (nvfp4(), nvfp4(rank=0, smooth=False)):
        written(tmp_path, "modelopt", layer)
        theirs = json.loads((tmp_path / "hf_quant_config.json").read_text())
        ours = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
        assert convert.convert_hf_quant_config_format(theirs) == ours


def test_kitchen_decodes_our_weights(tmp_path):
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    layer = nvfp4(rank=0, out=144, width=208)
    held, _ = written(tmp_path, "comfyui-nvfp4", layer)
    scales = held["weight_scale_2"], held["weight_scale"]
    found = eager.dequantize_nvfp4(held["weight"], *scales, output_type=torch.float32)
    assert torch.equal(found, dequantize(layer.weight))
    layer = mxfp8()
    held, _ = written(tmp_path, "comfyui-mxfp8", layer)
    scales = held["weight_scale"].view(torch.float8_e8m0fnu)
    found = eager.dequantize_mxfp8(held["weight"], scales, torch.float32)
    assert torch.equal(found, dequantize(layer.weight))


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (128, 4), (130, 9), (300, 3)])
def test_kitchen_has_the_same_tiles(count, columns):
    utilities = pytest.importorskip("comfy_kitchen.float_utils")
    scales = torch.arange(count * columns).view(count, columns).to(torch.uint8)
    assert torch.equal(to_tiles(scales), utilities.to_blocked(scales, flatten=False))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kitchen_rounds_activations_as_emulated(dtype):
    eager = pytest.importorskip("comfy_kitchen.backends.eager.quantization")
    x = (rows(64, 48) * torch.linspace(0.01, 3, 64)).to(dtype)
    scale = (x.abs().amax() / (448 * 6)).float()
    for given, static in ((None, scale), (torch.tensor(0.5), torch.tensor(0.5))):
        codes, blocks = eager.quantize_nvfp4(x, static)
        found = eager.dequantize_nvfp4(codes, static, blocks, output_type=torch.float32)
        whole = get_format("nvfp4", tensor_scale="tensor")
        assert torch.equal(found, round_activation(x, whole, given))
    codes, blocks = eager.quantize_mxfp8(x)
    found = eager.dequantize_mxfp8(codes, blocks, torch.float32)
    assert torch.equal(found, round_activation(x, get_format("mxfp8_e4m3", exponent="rceil")))


@pytest.mark.parametrize(("block", "activation"), [(64, "int4"), (16, "int4")])
def test_kitchen_computes_the_rotated_layer(tmp_path, block, activation):
    eager = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    layer = rotated(block, activation)
    held, read = written(tmp_path, "comfyui-convrot_w4a4", layer)
    found = eager.dequantize_convrot_w4a4_weight(held["weight"], held["weight_scale"], block)
    assert torch.allclose(found, layer.effective_weight(), atol=1e-6)
    x = rows()
    arguments = held["weight"], held["weight_scale"], held["bias"].float(), block
    theirs = eager.convrot_w4a4_linear(x, *arguments)
    emulated = EngineLinear(replace(read, dtype=torch.float32))
    assert difference(emulated(x), theirs) < 1e-3
    assert difference(theirs, layer.forward(x)) < 3e-2


@pytest.mark.parametrize(("width", "rank"), [(128, 16), (64, 0), (256, 32)])
def test_sdnq_decodes_our_weight(tmp_path, width, rank):
    dequantizer = pytest.importorskip("sdnq.dequantizer")
    layer = packed_layer(smooth=False, width=width, rank=rank)
    held, _ = written(tmp_path, "sdnq", layer)
    groups = torch.Size((128, -1, 64)) if width > 64 else torch.Size((128, 64))
    codes = dequantizer.unpack_weights(held["weight"], "int4", groups, dtype=torch.float32)
    branch = [held[n].float() if rank else None for n in ("svd_up", "svd_down")]
    shape = torch.Size((128, width))
    found = dequantizer.dequantize_symmetric(codes, held["scale"], *branch, result_shape=shape)
    expected = dequantize(layer.weight)
    if rank:
        expected = (
            expected
            + dequantize(layer.left).bfloat16().float() @ dequantize(layer.right).bfloat16().float()
        )
    assert torch.allclose(found, expected, atol=0 if rank == 0 else 1e-6)


@pytest.mark.parametrize("method", ["rtn", "loraq_o2"])
def test_diffusers_loads_our_file_by_sdnq(tiny_folder, tmp_path, method):
    pytest.importorskip("sdnq")
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    import loraq
    from tests.diffusers.test_checkpoints import forward

    pipe = PixArtSigmaPipeline.from_pretrained(tiny_folder)
    made = loraq.quantize(pipe, loraq.recipe(method), progress=False)
    source = Source(pipe.transformer, made.layers, torch.float16)
    find_target("sdnq").write(source, tmp_path)
    theirs = PixArtTransformer2DModel.from_pretrained(tmp_path)
    replaced = [n for n, m in theirs.named_modules() if hasattr(m, "sdnq_dequantizer")]
    assert sorted(replaced) == sorted(made.layers)
    assert difference(forward(load_network(tmp_path)), forward(theirs)) < 1e-2
