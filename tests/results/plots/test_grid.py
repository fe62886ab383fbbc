"""Image grids and heat maps: positions, labels, errors for inconsistent arguments."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from loraq.errors import LoraqError
from loraq.results.plots.grid import image_grid
from loraq.results.plots.layer_errors import block_numbers, layer_error_map, role_by_depth
from loraq.results.record import Record

COLOURS = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]


@pytest.fixture
def columns(tmp_path: Path) -> list[list[Path]]:
    """Three columns of two single-colour images."""
    made = []
    for column, colour in enumerate(COLOURS):
        made.append([tmp_path / f"{column}_{row}.png" for row in range(2)])
        for row, path in enumerate(made[-1]):
            Image.new("RGB", (64, 64), tuple(c // (row + 1) for c in colour)).save(path)
    return made


def count(pixels: np.ndarray, colour: tuple[int, ...]) -> int:
    return int((pixels == colour).all(axis=-1).sum())


def test_every_image_is_shown_completely_and_in_order(columns, tmp_path: Path):
    labels = ["16-bit", "RTN W4A4", "LoRaQ O2, 8-bit branch, rank 19"]
    out = image_grid(labels, columns, ["a red ball", "lobster " * 60], tmp_path / "p" / "grid.png")
    pixels = np.asarray(Image.open(out))
    for row in (1, 2):
        assert [count(pixels, tuple(c // row for c in colour)) for colour in COLOURS] == [
            128**2
        ] * 3
    centres = [np.argwhere((pixels == colour).all(-1)).mean(0) for colour in COLOURS]
    assert centres[0][1] < centres[1][1] < centres[2][1] and centres[0][0] == centres[2][0]
    head = pixels[: int(centres[0][0]) - 64]
    assert (head < 100).any(), "the names are written above"
    prompts = pixels[int(centres[0][0]) - 64 :, : int(centres[0][1]) - 64]
    assert (prompts < 100).any(), "the prompts are written at the left"
    assert (
        image_grid(
            labels, columns, ["a red ball", "lobster " * 60], tmp_path / "2.png"
        ).read_bytes()
        == out.read_bytes()
    )


def test_difference_maps_show_four_times_the_difference(columns, tmp_path: Path):
    out = image_grid(
        ["a", "b"], [columns[0], columns[0]], ["x", "y"], tmp_path / "g.png", differences=True
    )
    assert count(np.asarray(Image.open(out)), (0, 0, 0)) == 2 * 128**2  # equal images: black
    Image.new("RGB", (64, 64), (210, 30, 30)).save(columns[1][0])
    out = image_grid(
        ["a", "b"],
        columns[:2],
        ["x", "y"],
        tmp_path / "g.png",
        differences=True,
        notes=["", "9 dB"],
    )
    assert count(np.asarray(Image.open(out)), (40, 0, 0)) == 128**2


def record(row: str, scale: float, blocks: int = 4) -> Record:
    layers = [
        {
            "layer": f"transformer_blocks.{block}.{role}",
            "role": role,
            "weight_error": 0.1,
            "output_error": scale * (block + 1) / 10,
        }
        for block in range(blocks)
        for role in ("self_q", "ff_up", "ff_down")
    ]
    return Record("k", "e", row, row.upper(), {}, "m", {}, layers)


def test_layer_error_map_has_the_rows_with_layers(tmp_path: Path):
    reference = Record("k", "e", "reference", "16-bit", {}, "m", {})
    rows = [reference, record("rtn", 1.0), record("svdquant", 0.5), record("zero", 0.0)]
    out = layer_error_map(rows, tmp_path / "errors.png")
    image = Image.open(out)
    assert image.mode in ("RGB", "RGBA") and min(image.size) > 150
    assert len(np.unique(np.asarray(image).reshape(-1, np.asarray(image).shape[-1]), axis=0)) > 50
    again = layer_error_map(rows, tmp_path / "again.png")
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(LoraqError, match="No record has a layer"):
        layer_error_map([reference], tmp_path / "none.png")


def test_roles_and_depths_come_from_the_layers_names():
    roles, depths, field = role_by_depth(record("rtn", 1.0), "output_error")
    assert roles == ["self_q", "ff_up", "ff_down"] and depths == [0, 1, 2, 3]
    assert field[1] == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_blocks_of_several_lists_are_counted_through():
    """Two blocks 0 of FLUX, or of two experts, were one cell with the mean of their errors."""
    flux = ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q")
    single = ("single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.2.proj_out")
    assert [*block_numbers([*flux, *single]).values()] == [0, 1, 2, 4]
    experts = ("transformer.blocks.1.ffn.net.2", "transformer_2.blocks.0.attn1.to_out.0")
    assert [*block_numbers(experts).values()] == [1, 2]
    assert block_numbers(["proj_out"]) == {"proj_out": 0}


def test_inconsistent_arguments_raise(columns, tmp_path: Path):
    out = tmp_path / "g.png"
    for labels, images, prompts, words in (
        (["a"], columns, ["x", "y"], "1 labels for 3 columns"),
        (["a", "b", "c"], columns, ["x"], "1 prompts"),
        (["a"], [[tmp_path / "none.png"]], ["x"], "none.png does not exist"),
    ):
        with pytest.raises(LoraqError, match=words):
            image_grid(labels, images, prompts, out)
    assert not out.exists()
