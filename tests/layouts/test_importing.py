"""Files of other programs in a network of diffusers: read again, or refused in words."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtSigmaPipeline
from safetensors.torch import load_file, save_file

from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.layouts.engine_linear import EngineLinear
from loraq.layouts.files import WEIGHTS
from loraq.layouts.importing import load_contents, load_network, put_into
from loraq.layouts.targets import Source, find_target
from tests.diffusers.test_checkpoints import forward
from tests.layouts.layers import difference


@pytest.fixture(scope="module")
def exported(packed, tmp_path_factory):
    """The packed network, and the folder of its export."""
    folder, network = tmp_path_factory.mktemp("kitchen"), packed.transformer
    write(network, folder)
    return network, folder


def write(network, folder):
    layers = {n: m.tensors for n, m in network.named_modules() if isinstance(m, QuantizedLinear)}
    find_target("comfy-kitchen").write(Source(network, layers, torch.float16), folder)


def test_a_network_of_exported_layers_computes_what_the_packed_one_does(exported, tiny_folder):
    packed, folder = exported
    network = load_network(folder)
    assert sum(isinstance(module, EngineLinear) for module in network.modules()) == 16
    assert difference(forward(network), forward(packed)) < 0.1
    other = PixArtSigmaPipeline.from_pretrained(tiny_folder).transformer
    put_into(other, load_contents(folder))
    assert torch.equal(forward(other), forward(network))
    with pytest.raises(LoraqError, match="cannot be saved"):
        network.save_pretrained(folder / "again")


def test_what_is_not_quantised_has_the_types_that_diffusers_gives_it(
    exported, tiny_folder, monkeypatch
):
    kind, dtype = type(exported[0]), torch.bfloat16
    monkeypatch.setattr(kind, "_keep_in_fp32_modules", ["adaln_single"])
    expected = kind.from_pretrained(tiny_folder / "transformer", dtype=dtype)
    assert expected.adaln_single.linear.weight.dtype != expected.proj_out.weight.dtype == dtype
    found = dict(load_network(exported[1], dtype).named_parameters())
    wanted = dict(expected.named_parameters())
    assert all(held.dtype == wanted[name].dtype for name, held in found.items())
    assert load_network(exported[1], dtype).pos_embed.pos_embed.dtype == torch.float32


def test_what_is_exported_again_has_the_same_bytes(exported, tmp_path):
    network, folder = exported
    write(network, tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_files_that_do_not_fit_a_network_are_refused(exported, tiny_folder, tmp_path):
    _, folder = exported
    tensors, config = load_file(folder / WEIGHTS), (folder / "config.json").read_text()
    file = tmp_path / WEIGHTS
    (tmp_path / "config.json").write_text(config)
    layer = "transformer_blocks.0.attn1.to_q"
    moved = {n.replace(layer, "transformer_blocks.0.attn1.to_p"): t for n, t in tensors.items()}
    fewer, two = {n: t for n, t in tensors.items() if n != "proj_out.bias"}, torch.ones(2)
    cases = {
        "no tensor 'proj_out.bias' \\(1 are missing": fewer,
        f"no tensor '{layer}.bias'": {n: t for n, t in tensors.items() if n != f"{layer}.bias"},
        "tensor 'proj_outs.bias'.*Did you mean proj_out.bias": tensors | {"proj_outs.bias": two},
        r"'proj_out.bias' is \(2,\) in the file and": tensors | {"proj_out.bias": two},
        "layer 'transformer_blocks.0.attn1.to_p'.*Did you mean": moved,
    }  # fmt: skip
    for message, held in cases.items():
        save_file(held, file)
        with pytest.raises(LoraqError, match=message):
            load_network(tmp_path)
    for other in (file, tmp_path / "second.safetensors"):
        save_file(tensors, other)
    with pytest.raises(LoraqError, match=r"Two files in .* hold '.*'\. Pass one of the files"):
        load_network(tmp_path)
    other.unlink()
    save_file({"a.weight": torch.ones(2)}, file)
    with pytest.raises(LoraqError, match=r"none of the layouts that are read here .comfy-kitchen"):
        load_contents(file)
    with pytest.raises(LoraqError, match="no safetensors file"):
        load_contents(tmp_path / "absent")
    save_file(tensors, tmp_path / "alone.safetensors")
    with pytest.raises(LoraqError, match="put_into"):
        load_network(tmp_path / "alone.safetensors")
