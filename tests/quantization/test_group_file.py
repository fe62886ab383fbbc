"""Files of packed layers: a header that does not fit its tensors is refused, not read."""

from __future__ import annotations

import json
import re

import pytest
import torch

from loraq import recipe
from loraq.errors import LoraqError
from loraq.quantization.group_file import load_group, save_group
from loraq.quantization.quantizer import quantize_model
from tests.quantization.toy import Toy, toy_layers

Q, K = "blocks.0.to_q", "blocks.0.to_k"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    chosen = recipe("loraq_o2", "quant.branch.rank=4", "quant.transform.hadamard=32")
    model = quantize_model(Toy(), toy_layers(), chosen)
    path = tmp_path_factory.mktemp("group") / "group.safetensors"
    save_group(path, {name: model.layers[name] for name in (Q, K)}, {"seconds": 1.5})
    return path


def edited(saved, tmp_path, change):
    """A copy of the file; `change` receives the header, and its entries of layers as objects."""
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    layers = json.loads(header["__metadata__"]["layers"])
    change(header, layers)
    header["__metadata__"]["layers"] = json.dumps(layers)
    text = json.dumps(header).encode()
    path = tmp_path / "edited.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return path


def without(part):
    return lambda header, layers: layers[Q].pop(part)


def changed(*place, to):
    def change(header, layers):
        target = layers
        for name in place[:-1]:
            target = target[name]
        target[place[-1]] = to

    return change


DAMAGE = {
    "no weight": (without("weight"), "to_q: the entry 'weight' is missing"),
    "no right": (without("right"), "to_q: the entry has only a part of a branch"),
    "left misspelt": (
        lambda header, layers: layers[Q].update(leff=layers[Q].pop("left")),
        "Unknown entry 'leff'. Did you mean 'left'",
    ),
    "a bias that is not there": (
        changed(Q, "bias", to=False),
        "'blocks.0.to_q.bias' belongs to no",
    ),
    "a layer that is not there": (
        lambda header, layers: layers.pop(K),
        "the tensor 'blocks.0.to_k.* belongs to no layer",
    ),
    "another layer's tensors": (
        changed(Q, "weight", "tensors", to=f"{K}.weight"),
        "the tensor 'blocks.0.to_q.weight.* belongs to no layer",
    ),
    "smoothing that is not there": (
        changed(Q, "transform", "smooth", to=True),
        "the tensor 'blocks.0.to_q.transform.smooth' is missing|with other settings",
    ),
    "another shape": (changed(Q, "weight", "shape", to=[32, 16]), "do not fit each other"),
    "another rank": (changed(Q, "left", "shape", to=[32, 8]), "do not fit each other"),
    "a block that does not divide": (changed(Q, "transform", "block", to=24), "not a power of two"),
    "no rotation": (changed(Q, "transform", "block", to=0), "with other settings|belongs to no"),
    "a shift in words": (changed(Q, "transform", "shift", to="0"), 'shift is "0", not a number'),
    "yes for true": (changed(Q, "bias", to=1), "bias is 1, not true or false"),
    "more bits": (changed(Q, "activation", "bits", to=8), "is not the format .int4. of the table"),
    "an unknown format": (changed(Q, "weight", "format", "name", to="int5"), "Unknown format"),
    "a scale that is not its": (changed(Q, "activation", "scale", to="e8m0"), "scale='e8m0'"),
    "one scale for all tokens": (changed(Q, "activation", "block", to=-1), "those of one token"),
    "no rule of rounding": (
        lambda header, layers: layers[Q]["activation"].pop("exponent"),
        "the entry 'exponent' is missing",
    ),
    "no tensor": (lambda header, layers: header.update(x=1), "invalid JSON in header"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_header_that_does_not_fit_is_refused(saved, tmp_path, case):
    change, words = DAMAGE[case]
    with pytest.raises(
        LoraqError, match=rf"(?s)edited.safetensors' is damaged .*({words}).*run again"
    ):
        load_group(edited(saved, tmp_path, change))


def test_an_untouched_header_is_read(saved, tmp_path):
    layers, _ = load_group(edited(saved, tmp_path, lambda header, layers: None))
    for name, layer in load_group(saved)[0].items():
        assert torch.equal(layer.effective_weight(), layers[name].effective_weight())


@pytest.mark.parametrize("metadata", [{}, {"info": "[1]"}, {"info": "{"}, {"layers": "{}}"}])
def test_notes_that_cannot_be_read_are_damage(saved, tmp_path, metadata):
    data = saved.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    kept = {"layout": header["__metadata__"]["layout"]}
    header["__metadata__"] = {**(header["__metadata__"] if metadata else kept), **metadata}
    text = json.dumps(header).encode()
    path = tmp_path / "edited.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(LoraqError, match=re.escape(str(path)) + "' is damaged"):
        load_group(path)


def test_seconds_that_are_no_number_are_damage(saved, tmp_path):
    path = edited(saved, tmp_path, lambda header, layers: None)
    path.with_suffix(".seconds").write_text("1.5.2\n")
    with pytest.raises(LoraqError, match="is damaged"):
        load_group(path)
