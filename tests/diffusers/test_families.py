"""Packed checkpoints of other families than PixArt-Σ and SANA, on their little transformers."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

import loraq.diffusers_quantizer  # noqa: F401  (diffusers loads packed checkpoints)
from loraq.compose import recipe
from loraq.models import Layer
from loraq.models.denoisers import Experts, dtype_of
from loraq.quantization.quantizer import quantize_model
from tests.pipelines import little_folder


def test_what_a_class_keeps_in_float32_stays_so_in_a_packed_checkpoint(tmp_path):
    """Wan's time embedding and norms were read in the model's dtype, so that images differed."""
    folder = little_folder("wan") / "transformer"
    net = WanTransformer3DModel.from_pretrained(folder, dtype=torch.bfloat16)
    layer = Layer("blocks.0.ffn.net.2", "ff_down", (48, 112), "blocks.0.ff.down")
    quantize_model(net, [layer], recipe("rtn"), progress=None).apply(net)
    assert next(net.parameters()).dtype == torch.float32
    assert dtype_of(net) == dtype_of(Experts({"transformer": net})) == torch.bfloat16
    net.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in net.state_dict().items()}
    assert torch.float32 in types.values() and torch.bfloat16 in types.values()
    assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == types
    assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in net.state_dict().items())
