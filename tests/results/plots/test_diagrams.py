"""Diagrams: complete PNGs, reproducible bytes, positions, errors for empty input."""

from __future__ import annotations

import itertools
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from loraq.errors import LoraqError
from loraq.results import committed
from loraq.results.plots import plots, style
from loraq.results.plots.diagrams import draw_diagrams
from loraq.results.plots.plots import Point
from loraq.results.plots.ranking import Ranked, ranking_plot

ROLES = ("all", "self_q", "ff_up", "ff_down")
SERIES = {
    row: {
        role: [(place + 1) * 0.9**step / 50 for step in range(8)]
        for place, role in enumerate(ROLES)
    }
    for row in ("W only", "A only", "both", "RTN")
}
POINTS = [
    Point("RTN", "no branch", 4.25, 25.5, 25.0, 26.1),
    Point("Hadamard", "no branch", 4.26, 27.2, 26.5, 27.9),
    Point("SVDQuant r9", "SVDQuant", 4.90, 30.4, 29.9, 31.0),
    Point("LoRaQ r19", "LoRaQ", 4.90, 31.2),
    Point("LoRaQ r36", "LoRaQ", 4.91, 31.0, 30.0, 32.0),
]
LOSSES = {"alternation": [0.1, 0.06, 0.051, 0.0505], "adam": [0.11 * 0.99**i for i in range(80)]}
CHOICE = {
    f"blocks.{block}.{role}": (role, block, 4 * block + place, 8 if place == block == 1 else 4)
    for block in range(5)
    for place, role in enumerate(ROLES[1:])
}
RANKED = [
    Ranked(p.label, p.family, {"PSNR": (p.y, p.lo, p.hi), "LPIPS": (1 / p.y, None, None)})
    for p in POINTS
]
HIGHER = {"PSNR": True, "LPIPS": False}
PICTURES = {
    "ranking": lambda path: ranking_plot(RANKED, path, HIGHER, "all"),
    "steps": lambda path: plots.steps_plot(SERIES, path, "by role"),
    "pareto": lambda path: plots.pareto_plot(POINTS, path, title="quality"),
    "convergence": lambda path: plots.convergence_plot(LOSSES, path),
    "allocation": lambda path: plots.allocation_map(CHOICE, path, "ranks"),
}


def coloured(path: Path, colour: str) -> np.ndarray:
    """(row, column) of the pixels of that colour."""
    wanted = np.array(matplotlib.colors.to_rgb(colour)) * 255
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(float)
    return np.argwhere(np.abs(pixels - wanted).max(-1) < 6)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_complete_and_reproducible(name: str, tmp_path: Path):
    path = PICTURES[name](tmp_path / "new" / "a.png")
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 30}):
        again = PICTURES[name](tmp_path / "b.png")  # the user's own settings have no effect
    assert again.read_bytes() == path.read_bytes() and dict(matplotlib.rcParams) == before
    with Image.open(path) as image:
        image.load()
        assert image.format == "PNG" and min(image.size) > 200 and max(image.size) < 2000
        assert "Software" not in image.info
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert 0.005 < (pixels < 250).any(-1).mean() < 0.8
    assert len(np.unique(pixels, axis=0)) > 50
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]


def test_higher_errors_are_drawn_higher_and_all_of_them_in_black(tmp_path: Path):
    path = plots.steps_plot({"one": SERIES["both"]}, tmp_path / "s.png")
    heights = [coloured(path, style.COLOURS[n])[:, 0].max() for n in range(3)]
    assert heights[0] > heights[1] > heights[2], "self_q < ff_up < ff_down"
    falling = {role: values[::-1] for role, values in SERIES["both"].items()}
    assert plots.steps_plot({"one": falling}, tmp_path / "t.png").read_bytes() != path.read_bytes()
    shifted = plots.steps_plot({"one": falling}, tmp_path / "u.png", steps=range(0, 16, 2))
    assert shifted.read_bytes() != (tmp_path / "t.png").read_bytes()


def test_steps_of_zero_error_are_left_out(tmp_path: Path):
    values = {"all": [0.1, 0.2], "self_q": [0.0, 0.05], "ff_up": [0.0, 0.0]}
    assert plots.steps_plot({"row": values}, tmp_path / "s.png").is_file()


@pytest.mark.parametrize("higher", [True, False])
def test_frontier_has_the_best_point_for_each_memory(higher: bool):
    points = [Point(str(n), "f", x, y if higher else -y) for n, (x, y) in enumerate(
        [(4.0, 10), (4.0, 12), (4.5, 11), (5.0, 12), (5.0, 13), (6.0, 20)]
    )]  # fmt: skip
    got = plots.frontier(points[::-1], higher)
    assert [point.label for point in got] == ["1", "4", "5"]
    assert plots.frontier(got, higher) == got


def test_labels_of_crowded_points_do_not_overlap(tmp_path: Path):
    """Twelve points of nearly equal memory and quality: each label readable, none outside."""
    with style.figure_at(tmp_path / "p.png", (7, 5)) as figure:
        axes = figure.subplots()
        places = [(4.9 + 0.01 * (n % 3), 30 + 0.5 * n) for n in range(12)]
        axes.plot(*zip((4, 20), *places, (6, 40), strict=True), "o")
        labels = [(f"method number {n}", x, y, "#0072B2") for n, (x, y) in enumerate(places)]
        style.label_points(axes, labels, [(x, y, x, y) for x, y in places])
        figure.draw_without_rendering()
        boxes = [note.get_window_extent() for note in axes.texts if note.get_text()]
        assert len(boxes) == 12
        assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
        frame = axes.get_window_extent()
        assert all(frame.containsx(edge) for box in boxes for edge in (box.x0, box.x1))


def test_more_bits_are_framed_and_higher_ranks_are_darker(tmp_path: Path):
    path = plots.allocation_map(CHOICE, tmp_path / "a.png")
    frame = coloured(path, style.FRAME)
    uniform = {name: (*entry[:3], 4) for name, entry in CHOICE.items()}
    plain = plots.allocation_map(uniform, tmp_path / "b.png")
    assert len(frame) > 100 and not len(coloured(plain, style.FRAME))
    height, width = np.asarray(Image.open(path)).shape[:2]
    assert frame[:, 1].mean() < width / 2 and abs(frame[:, 0].mean() - height / 2) < height / 8


def test_empty_or_invalid_input_raises_and_writes_nothing(tmp_path: Path):
    out = tmp_path / "none.png"
    for call, words in (
        (lambda: plots.steps_plot({}, out), "without an error above 0"),
        (lambda: plots.steps_plot({"row": {"all": [0.0]}}, out), "without an error above 0"),
        (lambda: plots.steps_plot(SERIES, out, steps=[0, 1]), "2 steps"),
        (lambda: plots.pareto_plot([], out), "0 points"),
        (lambda: ranking_plot(RANKED, out, HIGHER | {"SSIM": True}), r"without all of .*RTN"),
        (lambda: plots.pareto_plot([Point("16-bit", "f", 16, float("inf"))], out), "16-bit"),
        (lambda: plots.convergence_plot({}, out), "without a loss above 0"),
        (lambda: plots.convergence_plot({"rtn": []}, out), "without a loss above 0"),
        (lambda: plots.allocation_map({}, out), "no layers"),
        (lambda: plots.allocation_map(CHOICE | {"x": ("ff_up", 1, 99, 4)}, out), "different entry"),
    ):
        with pytest.raises(LoraqError, match=words):
            call()
    assert not out.exists()


def test_a_ranking_has_the_best_row_on_top_of_every_panel(tmp_path: Path):
    rows = [
        Ranked(
            str(value), f"family {value}", {"PSNR": (value, None, None), "LPIPS": (1 / value,) * 3}
        )
        for value in (20.0, 40.0, 30.0)
    ]
    for higher in (HIGHER, {"LPIPS": False, "PSNR": True}, {"LPIPS": False}):
        path = ranking_plot(rows, tmp_path / "r.png", higher)
        dots = [coloured(path, style.COLOURS[n]) for n in range(3)]
        panels = 0.8 * Image.open(path).width  # the legend is to the right of them
        heights = [found[found[:, 1] < panels, 0].mean() for found in dots]
        assert heights[1] < heights[2] < heights[0]


def test_many_rows_are_ranked_and_few_are_plotted_against_memory(tmp_path: Path):
    names = {}
    for name in ("table1", "ablation_pareto"):
        records = committed.read_results(name).records
        names[name] = [path.name for path in draw_diagrams(records, tmp_path / name)]
    assert names == {"table1": ["ranking.png"], "ablation_pareto": ["pareto.png"]}
