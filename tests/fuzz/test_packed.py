"""Files of packed layers: a damaged one is refused, or its tensors are those that it states."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loraq import recipe
from loraq.layers.serialization import deserialize_layers, expected_tensors, serialize_layers
from loraq.quantization.diffusers_config import PackedConfig
from loraq.quantization.group_file import keep_group, load_group, save_group
from loraq.quantization.quantizer import quantize_model
from tests.fuzz.conftest import REFUSED
from tests.fuzz.test_records import VALUES, places
from tests.quantization.toy import Toy, toy_layers

pytestmark = pytest.mark.fuzz
RECIPES = {
    "int4": ("loraq_o2", "quant.branch.rank=4", "quant.transform.hadamard=32"),
    "nvfp4": ("loraq_o2", "quant.branch.rank=4", "format@quant.weight=nvfp4"),
    "rtn": ("rtn",),
}
LAYERS = ("blocks.0.to_q", "blocks.0.to_k", "blocks.0.down")
FOUND = {
    "a branch misspelt": ("left", "leff"),
    "a format that is not in the table": ("int4", "int5"),
    "a rule of rounding misspelt": ("exponent", "exponemt"),
    "a transform misspelt": ("smooth", "smoot"),
}
"""Words of a header, and others in their place that an earlier version read or failed on."""


@pytest.fixture(scope="module", params=RECIPES)
def saved(request, tmp_path_factory):
    """(file's bytes, its layers) of three layers of the toy model, and a folder for copies."""
    model = quantize_model(Toy(), toy_layers(), recipe(*RECIPES[request.param]))
    layers = {name: model.layers[name] for name in LAYERS}
    path = tmp_path_factory.mktemp("packed") / "group.safetensors"
    save_group(path, layers, {"seconds": 1.0, "fingerprint": "x"})
    return path, path.read_bytes(), layers


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def with_header(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def check(attempt, saved, data):
    """A file that is read is one that `save_group` writes: all its tensors belong to its layers."""
    path, _, _ = saved
    damaged = path.with_name("damaged.safetensors")
    damaged.write_bytes(data)
    found = attempt(lambda: load_group(damaged)[0])
    if found is not REFUSED:
        entries, _ = serialize_layers(found)
        stated = json.loads(header_of(data)[0]["__metadata__"]["layers"])
        for entry in (*entries.values(), *stated.values()):
            del entry["transform"]["tensors"]  # a name without meaning where there are no tensors
        assert entries == stated
        for name, layer in found.items():
            width = layer.weight.shape[1]
            assert layer.forward(torch.ones(2, width)).shape == (2, layer.weight.shape[0]), name


@settings(max_examples=120)
@given(data=st.data())
def test_a_truncated_file_is_refused(attempt, saved, data):
    path, whole, _ = saved
    length = data.draw(st.integers(0, len(whole) - 1))
    damaged = path.with_name("truncated.safetensors")
    damaged.write_bytes(whole[:length])
    assert attempt(lambda: load_group(damaged)) is REFUSED


@settings(max_examples=160)
@given(data=st.data())
def test_a_bit_of_the_header_is_another(attempt, saved, data):
    whole = bytearray(saved[1])
    place = data.draw(st.integers(0, 8 + int.from_bytes(whole[:8], "little") - 1))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    check(attempt, saved, bytes(whole))


@settings(max_examples=120)
@given(data=st.data())
def test_a_bit_anywhere_is_seen_by_the_checksum(saved, data):
    path, whole, _ = saved
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    assert not keep_group(path)
    path.write_bytes(whole)
    assert keep_group(path)


def change(data, tree, value, delete):
    """Delete one entry of nested data, or replace it by `value`."""
    *path, last = data.draw(st.sampled_from([place for place in places(tree) if place]))
    for name in path:
        tree = tree[name]
    if delete:
        del tree[last]
    else:
        tree[last] = value


@settings(max_examples=240)
@given(data=st.data(), value=VALUES, delete=st.booleans())
def test_an_entry_is_another(attempt, saved, data, value, delete):
    header, rest = header_of(saved[1])
    layers = json.loads(header["__metadata__"]["layers"])
    change(data, layers, value, delete)
    header["__metadata__"]["layers"] = json.dumps(layers)
    check(attempt, saved, with_header(header, rest))


@settings(max_examples=160)
@given(data=st.data(), value=VALUES, delete=st.booleans())
def test_the_configuration_of_a_packed_model_is_another(attempt, saved, data, value, delete):
    config = json.loads(json.dumps(PackedConfig.from_layers(saved[2], None).to_dict()))
    change(data, config, value, delete)

    def read():
        entries = PackedConfig(**config).layer_entries()
        return deserialize_layers(entries, expected_tensors(entries))

    found = attempt(read)
    if found is not REFUSED and found:
        assert PackedConfig.from_layers(found, None).to_dict()["layers"].keys() == found.keys()


@pytest.mark.parametrize("case", FOUND)
def test_what_was_read_once_is_refused(attempt, saved, case):
    old, new = FOUND[case]
    header, rest = header_of(saved[1])
    text = header["__metadata__"]["layers"].replace(f'"{old}"', f'"{new}"')
    header["__metadata__"]["layers"] = text
    check(attempt, saved, with_header(header, rest))
