"""Published models built from their configurations alone, on the meta device."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence

import pytest

from loraq.models.denoisers import gathered
from loraq.models.layers import family_of, list_layers
from tests import published


@pytest.mark.parametrize("name", published.names())
def test_the_denoisers_have_the_published_number_of_parameters(name):
    """With stored buffers, as in a checkpoint's size: SD3.5's table of positions is large."""
    denoisers = published.denoisers(name).values()
    count = sum(t.numel() for denoiser in denoisers for t in denoiser.state_dict().values())
    assert count == pytest.approx(published.source(name)["denoiser_parameters"], rel=0.05)


@pytest.mark.parametrize("name", published.names())
def test_every_network_of_a_published_pipeline_has_its_configuration(name):
    folder = published.FOLDER / name
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] and not part.startswith("tokenizer"):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            assert (folder / part / file).is_file(), part


def blocks(count: int, *roles: str, without_last: Sequence[str] = ()) -> Counter[str]:
    """The layers of `count` blocks of one kind; the last block lacks the roles `without_last`."""
    return Counter({role: count - (role in without_last) for role in roles})


SELF = ("self_q", "self_k", "self_v", "self_out")
CONTEXT = ("context_q", "context_k", "context_v", "context_out")
JOINT = (*SELF, *CONTEXT, "ff_up", "ff_down", "context_ff_up", "context_ff_down")
CROSS = (*SELF, "cross_q", "cross_out", "ff_up", "ff_down")
LAST = ("context_out", "context_ff_up", "context_ff_down")
FLUX = blocks(19, *JOINT) + blocks(38, *SELF[:3], "ff_up", "single_out")
LAYERS = {
    "flux_1_dev": (FLUX, 0.723),
    "flux_1_schnell": (FLUX, 0.724),
    "flux_2_dev": (blocks(8, *JOINT) + blocks(48, "single_in", "single_out"), 0.975),
    "flux_2_klein_4b": (blocks(5, *JOINT) + blocks(20, "single_in", "single_out"), 0.950),
    "qwen_image": (blocks(60, *JOINT), 0.665),
    "z_image_turbo": (blocks(34, *SELF, "ff_gate", "ff_up", "ff_down"), 0.977),
    "sd3_5_medium": (
        blocks(24, *JOINT, without_last=LAST)
        + blocks(13, "attn2_to_q", "attn2_to_k", "attn2_to_v", "attn2_to_out_0"),
        0.651,
    ),
    "sd3_5_large": (blocks(38, *JOINT, without_last=LAST), 0.663),
    "pixart_alpha": (blocks(28, *CROSS), 0.851),
    "pixart_sigma": (blocks(28, *CROSS), 0.852),
    "sana_1_6b": (blocks(20, *CROSS), 0.844),
    "sana_sprint_1_6b": (blocks(20, *CROSS), 0.841),
    "wan_2_2_t2v_a14b": (blocks(2 * 40, *CROSS), 0.837),
    "wan_2_2_ti2v_5b": (blocks(30, *CROSS), 0.868),
    "ltx_video": (blocks(28, *CROSS), 0.855),
    "stable_audio_open": (blocks(24, *CROSS), 0.964),
}
"""Model → quantised layers by role, from diffusers' blocks, and the share of weights measured."""


@pytest.mark.parametrize("name", LAYERS)
def test_the_quantised_layers_of_a_published_model(name):
    roles, share = LAYERS[name]
    net = gathered(published.denoisers(name), name)
    layers = list_layers(net, family_of(net))
    assert Counter(layer.role for layer in layers) == roles
    weights = sum(math.prod(layer.shape) for layer in layers)
    assert weights / sum(p.numel() for p in net.parameters()) == pytest.approx(share, abs=6e-4)
