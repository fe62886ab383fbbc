"""What the weights tell of layer inputs, against the networks themselves and the families' own."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch.nn import functional

from loraq.models.denoisers import denoiser_of
from loraq.models.family import family_for, find_family
from loraq.models.known_inputs import GUIDANCE, known_inputs, probed_inputs
from loraq.models.layers import list_layers
from loraq.models.moments import timesteps
from loraq.models.pointwise import channels_last
from tests import pipelines
from tests.little import draw_parameters

FROM_DATA = r"(context_)?ff_down|cross_(k|v|out)|single_out"
"""Roles whose inputs no weights determine. cross_q reads the residual stream in PixArt and LTX."""


def family_of_class(network):
    return find_family(family_for(type(network).__name__))


OWN = ("pixart_alpha", "sana_sprint")
"""Their families have `known_inputs` of their own."""
PROBED = [name for name in pipelines.names() if name not in OWN]


@pytest.mark.parametrize("name", PROBED)
def test_inputs_are_normalizations_with_the_known_shift_and_scale(name):
    """(x − shift)² = n²·(1 + scale)², with x and n from a step of the pipeline itself."""
    pipe = pipelines.build(name)
    network = pipe.transformer
    known = probed_inputs(network, family_of_class(network))
    layers = list_layers(network, "generic", skip=())
    check_which_are_known(layers, known)
    read, normalized = {}, {}
    for module in network.modules():
        if re.fullmatch(r".*(Layer|RMS)Norm", type(module).__name__) and not [*module.children()]:
            module.register_forward_hook(
                lambda m, args, out: normalized.update({m: normal(m, *args)})
            )
    for layer in layers:
        network.get_submodule(layer.name).register_forward_pre_hook(
            lambda m, args, key=layer.shares_input: read.update({key: channels_last(m, args[0])})
        )
    for position in (0, 13):
        read.clear(), normalized.clear()
        step_at(pipe, name, position / 31)
        checked = 0
        for input_id, x in read.items():
            if input_id in known and x.dim() > 2 and not input_id.endswith("out"):
                moments = known[input_id]
                square = (x - moments.mean_TI[position]).square().flatten(1, -2)
                parts = (n for n in normalized.values() if n.shape == square.shape)
                errors = [
                    (square - n.square() * moments.variance_TI[position]).abs().max() for n in parts
                ]
                assert min(errors) < 1e-3 * square.max(), input_id
                checked += 1
        assert checked


def check_which_are_known(layers, known):
    """All inputs behind normalisations, and none that depends on data."""
    unknown = {layer.role for layer in layers if layer.shares_input not in known}
    assert {layer.role for layer in layers if re.fullmatch(FROM_DATA, layer.role)} <= unknown
    allowed = f"{FROM_DATA}|cross_q|attn2_to_out_0"
    assert all(re.fullmatch(allowed, role) for role in unknown), unknown
    shapes = {layer.shares_input: layer.shape[1] for layer in layers}
    assert all(known[i].mean_TI.shape[1] == shapes[i] for i in known)


def normal(module, x):
    """The normalisation without weight and bias."""
    if "LayerNorm" in type(module).__name__:
        return functional.layer_norm(x.float(), x.shape[-1:], eps=module.eps)
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.eps)


def step_at(pipe, name, fraction):
    """One step of the pipeline in which its transformer is given this part of the timesteps."""
    little, forward = pipelines.settings(name), pipe.transformer.forward
    fixed = {"guidance": GUIDANCE, "pooled_projections": 0.0}

    def at(*args, **kwargs):
        given = inspect.signature(forward).bind(*args, **kwargs).arguments
        for key in ("timestep", "t"):
            if key in given:
                last = 1 if given[key].max() <= 1 else 999
                given[key] = torch.full_like(given[key], fraction * last, dtype=torch.float32)
        for key, value in fixed.items():
            if given.get(key) is not None:
                given[key] = torch.full_like(given[key], value)
        return forward(**given)

    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.forward = at
    try:
        pipe(
            prompt=["a red cat"],
            num_inference_steps=little.STEPS,
            generator=torch.Generator().manual_seed(0),
            **little.CALL,
        )
    finally:
        del pipe.transformer.forward


@torch.no_grad()
def test_inputs_of_blocks_that_have_tokens_before_the_batch_are_known():
    from diffusers import ErnieImageTransformer2DModel

    sizes = {"hidden_size": 48, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 64}
    channels = {"in_channels": 16, "out_channels": 16, "text_in_dim": 32}
    network = ErnieImageTransformer2DModel(**sizes, **channels, rope_axes_dim=(8, 8, 8))
    draw_parameters(network)
    known = probed_inputs(network, find_family("generic"))
    times = network.time_embedding(network.time_proj(timesteps(last=999)))
    shift, scale, _, shift_mlp, scale_mlp, _ = network.adaLN_modulation(times).chunk(6, dim=-1)
    for number, block in enumerate(network.layers):
        for name, norm, mean, factor in (
            ("self_attention.qkv", block.adaLN_sa_ln, shift, scale),
            ("mlp.gate_up", block.adaLN_mlp_ln, shift_mlp, scale_mlp),
        ):
            moments = known[f"layers.{number}.{name}"]
            torch.testing.assert_close(moments.mean_TI, mean, rtol=1e-3, atol=1e-4)
            variance = (norm.weight * (1 + factor)).square()
            torch.testing.assert_close(moments.variance_TI, variance, rtol=1e-3, atol=1e-4)
        assert f"layers.{number}.self_attention.out" in known
        assert f"layers.{number}.mlp.down" not in known


@pytest.mark.parametrize("name", ["tiny_pixart", "tiny_sana"])
def test_they_are_those_of_families_with_known_inputs_of_their_own(name):
    from diffusers import AutoModel

    from loraq.utils.assets import ASSETS

    network = AutoModel.from_pretrained(str(ASSETS / name), subfolder="transformer").float()
    family = family_of_class(network)
    own, found = family.known_inputs(network), known_inputs(network, family)
    assert own.keys() <= found.keys()
    for input_id in own:
        expected, moment = own[input_id], found[input_id]
        torch.testing.assert_close(moment.second_II, expected.second_II, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(moment.mean_I, expected.mean_I, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_families_with_their_own_know_the_variants_of_their_class(name):
    network = pipelines.build(name).transformer
    own = family_of_class(network).known_inputs(network)
    assert {"transformer_blocks.1.attn1.qkv", "transformer_blocks.1.ff.up"} <= own.keys()
    assert all(own[input_id].second_II.isfinite().all() for input_id in own)


def test_both_experts_are_known_by_their_own_weights():
    denoiser = denoiser_of(pipelines.build("wan"))
    known = known_inputs(denoiser, find_family("generic"))
    first, second = (known[f"{part}.blocks.0.attn1.qkv"] for part in denoiser)
    assert not torch.equal(first.second_II, second.second_II)
