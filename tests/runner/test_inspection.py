"""`loraq inspect`: counts beside published ones and PyTorch's, files that are edited and read."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from loraq.cli import main
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.models.discovery.arguments import InputShape, arguments
from loraq.models.discovery.work import count_products
from loraq.models.family import Family, find_family
from loraq.models.family_file import family_label
from loraq.models.layers import list_layers
from loraq.models.loading import meta_denoiser
from loraq.runner.inspection import inspect_model
from loraq.runner.layer_table import grouped
from tests import published
from tests.models import shipped


@pytest.mark.parametrize(
    ("name", "layers", "share"),
    [("flux_2_klein_4b", 100, 0.950), ("sana_1_6b", 160, 0.844), ("wan_2_2_ti2v_5b", 240, 0.868)],
)
def test_published_models_from_their_configurations_alone(name, layers, share, tmp_path):
    asked = ["model=hub", f"model.path={published.FOLDER / name}", f"output={tmp_path}"]
    found = inspect_model(["method=svdquant", *asked])
    expected = published.source(name)["denoiser_parameters"]
    assert found.parameters == pytest.approx(expected, rel=0.04)
    chosen = [entry for entry in found.entries if not entry.reason]
    assert len(chosen) == layers
    weights = sum(entry.weights for entry in chosen)
    assert weights / found.parameters == pytest.approx(share, abs=1e-3)
    assert sum(entry.layers for entry in grouped(found.entries)) == len(found.entries)
    total = sum(entry.bits * entry.weights for entry in chosen) / weights
    assert f"{total:.3f} bits per quantised weight" in found.text()
    assert 0.4 < sum(entry.products for entry in chosen) / found.products < 1
    lines = found.text().splitlines()
    assert max(map(len, lines[lines.index("") :])) <= 120
    shares = [re.findall(r"([\d.]+) %", line) for line in lines[lines.index("") :]]
    *rows, total = [pair for pair in shares if pair]
    assert total == ["100.0", "100.0"]
    for column in zip(*rows, strict=True):  # rounded to one digit
        assert sum(map(float, column)) == pytest.approx(100, abs=0.05 * len(rows))


@pytest.mark.parametrize(
    ("kind", "small"),
    [
        ("PixArtTransformer2DModel", {"num_attention_heads": 2, "cross_attention_dim": 144}),
        ("FluxTransformer2DModel", {"num_attention_heads": 1}),
    ],
)
def test_products_at_a_size_are_those_that_pytorch_counts(kind, small):
    network_class = shipped.classes()[kind]
    with torch.device("meta"):
        network = network_class(**shipped.settings(network_class) | small).eval()
    layout = "image" if kind.startswith("PixArt") else "packed"
    values = arguments(network, InputShape(side=12, tokens=7), layout)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(**values)
    found = count_products(network, Family(), positions=12 * 12, tokens=7)
    assert 2 * found.total == counter.get_total_flops()


def test_padding_is_seen_and_a_size_that_does_not_grow_linearly_is_not_guessed(monkeypatch):
    """Z-Image pads to 32 tokens: slopes at the smallest sizes would be 0."""
    network_class = shipped.classes()["ZImageTransformer2DModel"]
    small = {"dim": 256, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
    with torch.device("meta"):
        network = network_class(**shipped.settings(network_class) | small)
    sizes = [count_products(network, Family(), side**2, 64).total for side in (64, 128)]
    assert 3.5 < sizes[1] / sizes[0] < 16
    monkeypatch.setattr("loraq.models.discovery.work._PADDED", 1)
    assert count_products(network, Family(), 64**2, 64) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "stable_audio_open",
            "1024 positions of latents (assumed) and 512 tokens of text (assumed)",
        ),
        ("sana_1_6b", "1024 positions of latents and 300 tokens of text"),
    ],
)
def test_a_size_that_nothing_tells_is_marked_as_assumed(name, words):
    found = inspect_model(["model=hub", f"model.path={published.FOLDER / name}", "method=rtn"])
    assert found.lines[-1].endswith(words)


def test_a_small_model_is_counted_in_small_units():
    found = inspect_model(["model=tiny_sana", "method=rtn"])
    assert f"{found.parameters / 1e6:.3f} M parameters" in found.lines[0]
    assert " MB instead of " in found.lines[2] or " kB instead of " in found.lines[2]


def test_layers_are_written_edited_and_read_again(tmp_path, capsys):
    folder, file = published.FOLDER / "sana_1_6b", tmp_path / "layers.yaml"
    asked = ["model=hub", f"model.path={folder}", f"output={tmp_path}"]
    main(["inspect", *asked, "--layers", "--yaml", str(file), "--json", str(tmp_path / "l.json")])
    shown = capsys.readouterr().out
    assert "\ntransformer_blocks.19.ff.conv_point " in shown and f"model.family={file}" in shown
    assert len(json.loads((tmp_path / "l.json").read_text())["layers"]) == 227
    model = load_rows(["method=rtn", *asked])[-1].model
    network = meta_denoiser(model)
    before = list_layers(network, model.family)
    assert list_layers(network, str(file)) == before
    label = family_label(str(file))
    line = "'transformer_blocks.*.ff.conv_point': {role: ff_down, skip: false}"
    assert line in file.read_text()
    edited = line.replace("ff_down, skip: false", "mixed, skip: true")
    file.write_text(file.read_text().replace(line, edited))
    assert family_label(str(file)) != label
    after = list_layers(network, str(file))
    assert after == [layer for layer in before if layer.role != "ff_down"]
    every = list_layers(network, str(file), ())
    assert {layer.role for layer in every if "conv_point" in layer.name} == {"mixed"}
    row = load_rows(["method=rtn", *asked, f"model.family={file}"])[-1]
    assert "transformer_blocks.*.ff.conv_point" in row.quant.skip
    assert replace(find_family(str(file)), ROLES=(), name="sana") == replace(
        find_family("sana"), DEFAULT_SKIP=row.quant.skip
    )
    file.write_text(file.read_text().replace("*.ff.conv_point'", "*.ff.conv_poin'"))
    with pytest.raises(LoraqError, match=r"conv_poin' names no layer.*mean \S+conv_point[?]"):
        list_layers(network, str(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("layers: {blocks.*.q: {role: Self-Q}}", "'Self-Q' is part of file names"),
        ("layers: {blocks.*.q: {skip: true}}", "is not {role: NAME"),
        ("layer: {}", "no mapping 'layers'"),
        ("layers: {}\nskips: []", "Unknown setting"),
        ("family: sanna\nlayers: {}", "sanna.*Did you mean 'sana'"),
        ("layers:\n  b.*.q: {role: q}\n  b.*.q: {role: k}", "found duplicate key b.*.q"),
        (
            "layers: {transformer.b.*.q: {role: q}, transformer_2.b.*.q: {role: k}}",
            "role 'k', and 'q' in the other expert",
        ),
        (None, "No such file.*loraq inspect"),
    ],
)
def test_a_file_of_layers_that_cannot_be_read_is_refused(text, words, tmp_path):
    file = tmp_path / "layers.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LoraqError, match=words):
        find_family(str(file))
