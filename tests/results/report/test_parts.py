"""Parts of the report page: committed records, commands, heat maps, cells, diagrams."""

from __future__ import annotations

import math
import shlex

import pytest

from loraq.cli import main
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.results import committed
from loraq.results.report import page, write_report
from loraq.results.report.commands import experiment_command, row_commands
from loraq.results.report.figures import INK, both_schemes, svg_diagrams
from loraq.results.report.heat import LEVELS, heat_maps
from loraq.results.report.pareto import HEIGHT, WIDTH, make_pareto
from loraq.results.report.views import cell_view, table_view
from loraq.results.tables.text import Cell, Table
from loraq.utils.plain import to_plain


def test_committed_records_give_a_page_that_says_where_pictures_come_from(tmp_path):
    path = write_report(tmp_path / "results" / "demo", tmp_path / "page.html", ["svdquant"])
    text = path.read_text(encoding="utf-8")
    assert (
        "The images are not available" in text and "<code>loraq run experiment=demo</code>" in text
    )
    assert "results/demo, committed" in text
    psnr = next(r for r in committed.read_results("demo").records if r.row == "rtn").metrics["psnr"]
    assert f'class="interval">[{psnr["lo"]:.2f}, {psnr["hi"]:.2f}]' in text
    assert 'http-equiv="Content-Security-Policy" content="default-src' in text
    assert [line for line in text.splitlines() if "http" in line and "http-equiv" not in line] == []


def test_the_command_says_that_records_are_committed_ones(tmp_path, capsys):
    main(["report", "demo", "--output", str(tmp_path)])
    assert "'demo' was not run here" in capsys.readouterr().out
    assert (tmp_path / "results" / "demo" / "report.html").is_file()


def test_a_page_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "LIMIT", 1000)
    with pytest.raises(LoraqError, match="Show fewer rows: --rows"):
        write_report(tmp_path / "results" / "demo", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("name", "row"), [("demo", "loraq_o2_w4a8"), ("demo-tiny_sana", "rtn")])
def test_a_rows_command_gives_its_configuration(name, row):
    records = committed.read_results(name).records
    record = next(record for record in records if record.row == row)
    words = shlex.split(row_commands([record])[row])
    assert words[:2] == ["loraq", "run"]
    made = to_plain(load_rows(words[2:])[-1])
    for key, value in record.config.items():
        if key != "tracking":
            assert _with(made[key], value) == value, key


@pytest.mark.parametrize("given", [{"path": "tiny"}, {"hub_id": "owner/tiny"}])
def test_the_command_of_a_model_without_a_file_gives_its_configuration(
    given, tmp_path, monkeypatch
):
    record = next(r for r in committed.read_results("demo").records if r.row == "rtn")
    own = {"name": "tiny", "family": "generic", "path": None, "call": {"true_cfg_scale": 2.0}}
    record.config["model"] |= {**own, "max_sequence_length": None, **given}
    words = shlex.split(row_commands([record])["rtn"])
    assert "model=hub" in words and "+model.call.true_cfg_scale=2.0" in words
    words = [word.replace("…/", "") for word in words]
    made = to_plain(load_rows(words[2:], of_model=False)[-1])
    assert _with(made["model"], record.config["model"]) == record.config["model"]


def _with(made, like):
    """Settings that the record has, of those made: later releases add some with their defaults."""
    if isinstance(like, dict) and isinstance(made, dict):
        return {key: _with(made[key], like[key]) for key in like}
    return list(made) if isinstance(made, (list, tuple)) else made


def test_changed_settings_are_written_as_overrides():
    record = committed.read_results("demo").records[-1]
    record.config["data"]["count"] = 6
    record.config["quant"]["weight"]["name"] = "mxfp4_e2m1"
    record.config["metrics"]["names"] = ["psnr", "ssim"]
    commands = row_commands([record])
    assert shlex.split(commands[record.row])[2:] == [
        "experiment=demo",
        f"row={record.row}",
        "format@quant.weight=mxfp4_e2m1",
        "data.count=6",
        "metrics.names=[psnr,ssim]",
    ]
    assert experiment_command([record], commands) == commands[record.row]
    commands["rtn"] = "loraq run experiment=demo row=rtn data.count=6"
    assert experiment_command([record], commands) == "loraq run experiment=demo data.count=6"


def test_the_command_of_a_finder_in_a_file_can_be_given():
    """A record knows the file's name and hash; the command names the file."""
    record = committed.read_results("demo").records[-1]
    record.config["quant"]["branch"]["kind"] = "mine.py@0123456789abcdef"
    assert shlex.split(row_commands([record])[record.row])[2:] == [
        "experiment=demo",
        f"row={record.row}",
        "quant.branch.kind=mine.py",
    ]


def test_heat_maps_share_a_scale():
    records = committed.read_results("demo").records
    maps = heat_maps(records, records[:3])
    assert [map.label for map in maps.first] == ["RTN", "SVDQuant, 16-bit branch"]
    assert len(maps.first) + len(maps.others) == 5  # the 16-bit row has no quantised layers
    cells = [
        cell
        for map in (*maps.first, *maps.others)
        for _, line in map.roles
        for cell in line
        if cell
    ]
    errors = [layer["output_error"] for record in records for layer in record.layers]
    assert len(cells) == len(errors) == 5 * 48
    assert (maps.low, maps.high) == (f"{min(errors):.3f}", f"{max(errors):.3f}")
    ranked = sorted((float(number), level) for number, level in cells)
    assert [level for _, level in ranked] == sorted(level for _, level in ranked)
    assert {ranked[0][1], ranked[-1][1]} == {0, LEVELS - 1}
    assert heat_maps(records[:1], records[:1]) is None


def test_quality_against_memory_has_every_row_once_and_labels_that_keep_apart():
    records = committed.read_results("table1").records
    plot = make_pareto(records, records[:2])
    assert plot.better == "lower is better" and plot.x.logarithmic and plot.y.logarithmic
    assert [mark.label for mark in plot.marks] == [r.label for r in records if r.layers]
    by_label = {mark.label: mark for mark in plot.marks}
    rtn = records[3]
    assert f"LPIPS {rtn.metrics['lpips']['value']:.4g} [" in by_label["RTN"].reading
    for mark in plot.marks:
        assert 0 < mark.x < WIDTH and mark.bar[1] < mark.y < mark.bar[0] < HEIGHT
    heights = sorted(mark.text[1] for mark in plot.marks if mark.text and mark.text[2] == "start")
    assert len(heights) >= 5
    best = min(plot.marks, key=lambda mark: -mark.y)
    assert best.text and plot.edge.endswith(f",{best.y}")  # the best row ends the edge, labelled
    assert make_pareto(records[:2], []) is None


def test_cells_know_their_place_in_the_column():
    cells = [Cell(2.0, 1.0, 3.0, sign=True, mark="better"), Cell(-1.0, -2.0, 0.0, sign=True)]
    table = Table("t", ["row", "Δ PSNR ↑"], [["a", cells[0]], ["b", cells[1]]], ["`=`: equal"])
    view = table_view("paired", table)
    first, second = (row[1] for row in view.rows)
    assert (first.text, first.interval, first.claim) == ("+2.00", "[1.00, 3.00]", "better")
    assert first.track == (60.0, 100.0, 80.0, 40.0) and second.track == (0.0, 40.0, 20.0, 40.0)
    assert view.notes == ["=: equal"] and view.columns[1] == "Δ\u00a0PSNR\u00a0↑"
    endless = table_view("main", Table("t", ["x"], [[Cell(math.inf, math.inf, math.inf)]], []))
    assert endless.rows[0][0].track is None
    mixed = table_view("main", Table("t", ["row", "captions"], [["a", "–"], ["b", "seen"]], []))
    assert [row[1].number for row in mixed.rows] == [False, False]
    assert cell_view("–").value == "" and cell_view(1234).text == "1,234"


def test_diagrams_have_two_colour_schemes_and_are_the_same_each_time():
    records = committed.read_results("ablation_error_source").records
    drawn = svg_diagrams(records)
    assert [title for title, _ in drawn] == ["Output error over the denoising steps"]
    assert drawn == svg_diagrams(records)
    svg = '<svg width="1"><path style="fill: #ffffff; stroke: #000000"/></svg>'
    text = both_schemes(svg)
    assert f"--c{INK[1:]}:#000000" in text and "prefers-color-scheme:dark" in text
    assert 'style="fill: var(--cffffff); stroke: var(--c000000)"' in text
    pixels = '<svg width="1"><image href="data:"/></svg>'
    assert both_schemes(pixels) == pixels
