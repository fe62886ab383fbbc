"""Committed records, their tables and pages: import, refresh, detection of outdated files."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import groupby

import pytest

from loraq.errors import LoraqError
from loraq.results import committed
from loraq.results.pages import bench, refresh, times
from loraq.results.record import save_record
from loraq.utils.assets import CHECKOUT
from loraq.utils.files import write_json
from tests.damage import certify
from tests.results.tables.test_tables import rows

BRIEF = ("row", "bits/weight", "PSNR ↑", "LPIPS ↓")
BRIEF_PAIRED = ("Δ PSNR ↑", "Δ LPIPS ↓")
PAGE = "# T\n\n<!-- generated: table demo -->\n<!-- /generated -->\n\nend\n"


@pytest.fixture
def root(tmp_path):
    """An empty repository with one experiment in `conf/` and one page."""
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "demo.yaml").write_text("experiment: demo\n")
    (tmp_path / "README.md").write_text(PAGE)
    return tmp_path


@pytest.fixture
def finished(root):
    """outputs/results/demo as a run writes it."""
    listed = []
    for number, record in enumerate(rows()):
        record = type(record)(**{**record.__dict__, "key": f"k{number}", "commit": "abc"})
        certify(save_record(record, root / "outputs" / "record" / record.key / "record.json"))
        listed.append({"row": record.row, "record": record.key})
    folder = root / "outputs" / "results" / "demo"
    folder.mkdir(parents=True)
    write_json(folder / "rows.json", {"baseline": "svdquant", "rows": listed})
    return folder


def test_an_unmeasured_experiment_has_a_placeholder(root):
    assert refresh.refresh_all(root=root) == [root / "README.md"]
    text = (root / "README.md").read_text()
    assert "Not yet measured: no records of `demo`" in text and text.endswith("\n\nend\n")
    assert refresh.refresh_all(check=True, root=root) == []


def test_records_are_imported_and_pages_are_updated(root, finished):
    folder = committed.import_experiment(finished, root)
    assert folder == root / "results" / "demo"
    found = committed.read_results("demo", root)
    assert [record.row for record in found.records] == [record.row for record in rows()]
    assert {path.name for path in folder.iterdir() if path.suffix == ".md"} == {
        "main.md", "paired.md", "splits.md",
    }  # fmt: skip
    refresh.refresh_all(root=root)
    text = (root / "README.md").read_text()
    assert "| SVDQUANT" in text and "commit `abc`" in text and "uncommitted" not in text
    assert refresh.refresh_all(check=True, root=root) == []


def test_a_number_changed_by_hand_is_detected_and_restored(root, finished):
    folder = committed.import_experiment(finished, root)
    refresh.refresh_all(root=root)
    for path in (folder / "main.csv", root / "README.md"):
        whole = path.read_text()
        path.write_text(whole.replace("7654321", "1").replace("7,654,321", "1"))
        assert refresh.refresh_all(check=True, root=root) == [path]
        assert refresh.refresh_all(root=root) == [path]
        assert path.read_text() == whole
    (folder / "gone.tex").write_text("a table that no record gives\n")
    assert refresh.refresh_all(root=root) == [folder / "gone.tex"]
    assert not (folder / "gone.tex").exists()


def test_uncommitted_code_is_stated(root, finished):
    path = root / "outputs" / "record" / "k1" / "record.json"
    path.write_text(path.read_text().replace('"abc"', '"abc+"'))
    certify(path)
    committed.import_experiment(finished, root)
    assert committed.rows_from_changed_code(committed.read_results("demo", root)) == ["rtn"]
    assert "uncommitted changes (`+`): rtn" in refresh.table_block("demo", root)


def cells(text):
    """Row → title → cell of a Markdown table, without the footnotes' letters."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    title, _, *rows = [[cell.strip(" ᵃᵇᶜᵈᵉᶠ") for cell in line] for line in lines]
    return {row[0]: dict(zip(title, row, strict=True)) for row in rows}


def test_the_brief_table_has_a_few_columns_of_both(root, finished):
    assert "Not yet measured" in refresh.brief_block("demo", root)
    committed.import_experiment(finished, root)
    text = refresh.brief_block("demo", root)
    both = {part: cells(refresh.table_block(f"demo{part}", root)) for part in ("", "/paired")}
    for label, row in cells(text).items():
        assert list(row) == [*BRIEF, *BRIEF_PAIRED]
        differences = both["/paired"].get(label, dict.fromkeys(BRIEF_PAIRED, "–"))
        assert row.items() <= (both[""][label] | differences).items()
    assert "better or worse: the interval excludes 0" in text and "commit `abc`" in text
    other = refresh.brief_block("demo@rtn", root)
    label = next(
        record.label
        for record in committed.read_results("demo", root).records
        if record.row == "rtn"
    )
    assert f"paired differences to {label or 'rtn'}" in other and other != text
    assert f"differences to {label or 'rtn'}" in refresh.table_block("demo/paired@rtn", root)
    with pytest.raises(LoraqError, match="Did you mean 'rtn'"):
        refresh.brief_block("demo@rtm", root)


def test_a_row_that_was_run_again_replaces_the_committed_one(root, finished):
    committed.import_experiment(finished, root)
    before = committed.read_results("demo", root)
    old = next(record for record in before.records if record.row == "rtn")
    config = {**old.config, "quant": {"weight": {"name": "int4"}}}
    again = type(old)(**{**old.__dict__, "key": "new", "commit": "def", "config": config})
    for record in (again, before.records[0]):
        certify(save_record(record, root / "outputs" / "record" / record.key / "record.json"))
    folder = finished / "rows" / "rtn"
    folder.mkdir(parents=True)
    listed = [{"row": record.row, "record": record.key} for record in (before.records[0], again)]
    write_json(folder / "rows.json", {"baseline": None, "rows": listed})
    committed.import_row(folder, root)
    after = committed.read_results("demo", root)
    assert after.baseline == before.baseline
    assert [r.commit for r in after.records] == ["def" if r.row == "rtn" else "abc" for r in rows()]
    write_json(folder / "rows.json", {"baseline": None, "rows": [{"row": "rtm", "record": "new"}]})
    with pytest.raises(LoraqError, match=r"Unknown row of demo 'rtm'. Did you mean 'rtn'"):
        committed.import_row(folder, root)


def test_a_shared_product_counts_once(root, finished):
    for number, own in enumerate((10.0, 20.0)):
        path = root / "outputs" / "record" / f"k{number}" / "record.json"
        record = json.loads(path.read_text())
        record["timings"] = {"inputs:measure": 60.5, "images": own}
        if number:
            record["timings"] |= {"inputs:calibrate": 7.0, "moments": 1.0, "quantised": 0.25}
        record["machine"] = {"device": "cpu", "cpus": 2}
        path.write_text(json.dumps(record))
        certify(path)
    committed.import_experiment(finished, root)
    text = times.time_block("demo", root)
    assert "images 0 min 30 s" in text and "activations 1 min 08 s" in text
    assert "cpu, 2 cpus (model not recorded)" in text
    line = times.times_block("all", root).splitlines()[2]
    assert line.startswith("| `demo` | ")
    assert line.endswith("| a machine that was not recorded and cpu, 2 cpus (model not recorded) |")
    assert "| 1 min 39 s | 0 min 30 s |" in line
    (row,) = times.seconds_block("demo", root).splitlines()[2:3]
    assert row.endswith("| 8.0 | 0.2 |")


def test_a_record_of_another_row_raises(root, finished):
    folder = committed.import_experiment(finished, root)
    other = (folder / "records" / "rtn.json").read_text()
    (folder / "records" / "svdquant.json").write_text(other)
    with pytest.raises(LoraqError, match="Import the experiment again"):
        committed.read_results("demo", root)


@pytest.mark.parametrize(
    "page, words",
    [
        (PAGE.replace("table demo", "table dmeo"), "Did you mean 'demo'"),
        (PAGE.replace("table demo", "tabel demo"), "Did you mean 'table'"),
        (PAGE.replace("<!-- /generated -->\n", ""), "marker lines"),
        (PAGE.replace("table demo", "table"), "marker lines"),
    ],
)
def test_an_invalid_marker_raises(root, page, words):
    (root / "README.md").write_text(page)
    with pytest.raises(LoraqError, match=words):
        refresh.refresh_all(root=root)
    assert (root / "README.md").read_text() == page


def test_numbers_in_the_pages_are_those_of_the_records_and_nothing_heavy_is_loaded():
    """Of every page; a failure is mended by `python -m loraq.readme`."""
    code = (
        "import sys, loraq.results.pages.refresh as r; print('stale:', r.refresh_all(check=True));"
        "print(sorted({'torch', 'diffusers', 'hydra', 'wandb', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["stale: []", "[]"]


def test_every_benchmark_record_makes_a_table(root):
    (root / "results" / "bench").mkdir(parents=True)
    names = [path.stem for path in (CHECKOUT / "results" / "bench").glob("*.json")]
    page = root / "README.md"
    no_rows = {"batch_size", "engines", "errors", "kernel_counts"}
    for name in set(names) - no_rows:
        page.write_text(PAGE.replace("table demo", f"bench {name}"))
        refresh.refresh_page(page, root=root)
        assert f"no `results/bench/{name}.json`" in page.read_text()
        source = CHECKOUT / "results" / "bench" / f"{name}.json"
        (root / "results" / "bench" / source.name).write_bytes(source.read_bytes())
        refresh.refresh_page(page, root=root)
        parts = groupby(page.read_text().splitlines(), key=lambda line: line.startswith("|"))
        tables = [list(lines) for is_table, lines in parts if is_table]
        found = json.loads(source.read_text())
        held = [
            found[kind]
            for kind in ("rows", "methods", "ways", "metrics", "launchers")
            if kind in found
        ]
        rows = held[0] if held else found["settings"].get("ways", [found])  # or one row alone
        assert len(tables[0]) == 2 + len(rows)
        assert all(len({line.count("|") for line in table}) == 1 for table in tables)
    page.write_text(PAGE.replace("table demo", "bench parrity"))
    with pytest.raises(LoraqError, match=r"parrity.*Did you mean 'parity'"):
        refresh.refresh_page(page, root=root)


def test_error_rates_are_shown_before_and_now_and_withheld_verdicts_as_such(tmp_path):
    def row(kind, n, coverage, claims, before):
        shares = {"coverage": coverage, "coverage_before": coverage - 0.1}
        return {"differences": kind, "n": n, "claims": claims, "claims_before": before, **shares}

    simulations = [
        row(f"{metric} close", n, share, {"1": 1 - share, "60": 0.04}, {"1": 0.2})
        for metric, share in (("psnr", 0.95), ("ssim", 0.93))
        for n in (16, 32)
    ]
    made = {"commit": "abc", "machine": {"device": "cpu", "cpus": 2}, "versions": {"torch": "2"}}
    found = {"simulations": simulations, "kid": [{"n": 32, "coverage": 0.941}]}
    path = tmp_path / "errors.json"
    write_json(path, found | {"settings": {"families": {"1": 9, "60": 9}}} | made)
    text = bench.bench_block(path)
    assert "| close: coverage | 83 → 93 | 83 → 93 |" in text  # the worst metric
    assert "| close: claims in families of 1 | 20 → – (7) | 20 → 7 |" in text
    assert "| close: claims in families of 60 | – → – (4) | – → 4 |" in text
    assert "KID's interval: 94 % at N = 32." in text


def test_rows_made_twice_with_few_prompts_have_no_interval(tmp_path):
    few = {"first": 30.0, "last": 30.5, "mean": 0.5, "lo": None, "hi": None}
    rows = [{"row": "RTN", "psnr": few, "lpips": few}]
    spread = {"psnr": 0.5, "lpips": 0.5}
    made = {"commit": "abc", "machine": {"device": "cpu", "cpus": 2}, "versions": {"torch": "2"}}
    write_json(tmp_path / "again_x.json", {"rows": rows, "root_mean_square": spread} | made)
    assert "| RTN | 30.00 | 30.50 | +0.50 | " in bench.bench_block(tmp_path / "again_x.json")


def test_a_forward_records_ratios_are_of_equal_repeats(tmp_path):
    def way(*seconds):
        ratio = seconds[0] / 2.0
        return {"seconds": list(seconds), "median_seconds": seconds[0], "ratio": ratio}

    layer = {"bf16": way(1.0, 4.0, 2.0), "int4": way(0.5, 2.0, 3.0)}
    modules = {"b": {"bf16": way(2.0), "int4": way(1.0)}, "b.one": layer, "b.two": layer}
    settings = {"ways": ["bf16", "int4"], "bytes": {"bf16": 100, "int4": 30}}
    made = {"commit": "abc", "machine": {"device": "cpu", "cpus": 2}, "versions": {"torch": "2"}}
    path = tmp_path / "forward_x.json"
    write_json(path, {"settings": settings, "modules": modules} | made)
    assert "| int4 | 1000 | 0.50 | 4000 | 0.50 | 0.300 |" in bench.bench_block(path)


def test_layouts_that_refuse_for_one_reason_share_its_number(tmp_path):
    refused = {"refused": "kitchen cannot hold 2 of 2 layers.\n  2 layers, such as 'a': it turns."}
    held = {"losses": ["Less."], "median": 0.004, "largest": 0.1, "bytes": 1}
    rows = [
        {"name": "rtn", "targets": {"kitchen": held, "sdnq": refused}},
        {"name": "best", "targets": {"kitchen": refused, "sdnq": refused}},
    ]
    made = {"commit": "abc", "machine": {"device": "cpu", "cpus": 2}, "versions": {"torch": "2"}}
    settings = {"targets": {"kitchen": "a", "sdnq": "b"}}
    write_json(tmp_path / "engines.json", {"settings": settings, "rows": rows} | made)
    text = bench.bench_block(tmp_path / "engines.json")
    assert "| `kitchen` | 0.40 % | (1) |\n| `sdnq` | (1) | (1) |" in text
    assert "- (1) it turns.\n" in text and "- `kitchen`, rtn: Less." in text
