"""Tables: contents, claims of "better", and no dependency on torch."""

from __future__ import annotations

import csv
import io
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from loraq.errors import LoraqError
from loraq.metrics.common.intervals import mean_interval
from loraq.results.record import Record, save_record
from loraq.results.tables import tables

NAMES = [f"prompt_{i}" for i in range(64)]
SEEN = [i % 2 == 0 for i in range(64)]
NOISE = np.random.default_rng(0).normal(0, 3, 64)


def entry(values, direction, size=64):
    def part(chosen):
        mean, lo, hi = mean_interval(chosen)
        return {"value": mean, "lo": lo, "hi": hi, "n": len(chosen)}

    flags = np.asarray(SEEN[:size])
    values = np.asarray(values)
    return {
        **part(values),
        "direction": direction,
        "per_image": list(map(float, values)),
        "details": {"identical": 0, "cap": 95.0},
        "seen": part(values[flags]),
        "held_out": part(values[~flags]),
    }


def row(name: str, psnr: float, bits: float = 4.89, **changes) -> Record:
    distance = {"value": 12.5, "lo": None, "hi": None, "n": 64, "direction": "lower"}
    metrics = {
        "psnr": entry(psnr + NOISE + np.random.default_rng(len(name)).normal(0, 0.2, 64), "higher"),
        "lpips": entry(np.abs(NOISE) / 30 + 1 / psnr, "lower"),
        "fd_efflite0": {**distance, "reason": "biased at small N"},
        "kid_efflite0": {**distance, "value": 0.00125, "lo": 0.001, "hi": 0.0015},
    }
    budget = {
        "bits_per_weight": bits,
        "branch_bits_per_weight": 0.64,
        "nbytes": 7654321,
        "rank": 19,
    }
    fields = {
        "key": "k",
        "experiment": "demo",
        "row": name,
        "label": name.upper(),
        "config": {},
        "model_hash": "m",
        "budget": budget,
        "layers": [
            {"layer": "a", "role": "ff_up", "weight_error": 0.1, "output_error": 0.04},
            {"layer": "b", "role": "ff_down", "weight_error": 0.2, "output_error": 0.06},
        ],
        "images": {"hash": "h", "names": NAMES, "seen": SEEN},
        "metrics": metrics,
    }
    return Record(**{**fields, **changes})


def rows() -> list[Record]:
    reference = row(
        "reference", 60, bits=16.0, layers=[], metrics={}, budget={"bits_per_weight": 16.0}
    )
    return [reference, row("rtn", 25.0, 4.25), row("svdquant", 30.0), row("loraq", 31.0, 4.90)]


def test_main_table_has_value_interval_budget_and_n():
    text = tables.to_markdown(tables.main_table(rows(), "svdquant"))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    psnr = rows()[3].metrics["psnr"]
    assert f"{psnr['value']:.2f} [{psnr['lo']:.2f}, {psnr['hi']:.2f}]" in lines["LORAQ"]
    assert "4.900 =" in lines["LORAQ"] and "4.250 |" in lines["RTN"]  # 0.2 % and 13 % away
    assert "7,654,321" in lines["LORAQ"] and " 0.1500 " in lines["LORAQ"] and "19" in lines["LORAQ"]
    assert "1.25 [1.00, 1.50]" in lines["LORAQ"]  # KID ×10³
    assert "N = 64 prompts (32 seen in training, 32 held out)" in text
    assert "PSNR ↑" in text and "KID (efflite0) ×10³ ↓" in text
    captions = {"data": {"captions": "asset:captions.json"}}
    own = [replace(r, config={**captions, "model": {"path": "asset:tiny_sana"}}) for r in rows()]
    assert "32 held out" in tables.to_markdown(tables.main_table(own, "svdquant"))
    assert tables.splits_table(own).rows
    others = [replace(r, config={**captions, "model": {"path": "little"}}) for r in rows()]
    assert "- N = 64 prompts\n" in tables.to_markdown(tables.main_table(others, "svdquant"))
    assert not tables.splits_table(others).rows  # of its training nothing is known
    beside = tables.to_markdown(tables.main_table([*own, replace(others[1], row="saved")]))
    assert "- N = 64 prompts\n" in beside and "differ in N" not in beside
    flags = [True] * 64
    published = [replace(r, images={**r.images, "seen": flags}) for r in rows()]
    assert "- N = 64 prompts\n" in tables.to_markdown(tables.main_table(published, "svdquant"))


def test_a_cell_without_interval_or_value_has_a_footnote():
    text = tables.to_markdown(tables.main_table(rows(), "svdquant"))
    notes = [line for line in text.splitlines() if line.startswith("- ")]
    mark = next(note for note in notes if "biased at small N" in note)[2]
    assert f"FD (efflite0) ↓{mark}" in text
    assert "no layer is quantised" not in text  # which these records do not say
    plain = tables.main_table([replace(rows()[0], config={"method": "reference"})])
    assert "no layer is quantised" in tables.to_markdown(plain)
    missing = next(note for note in notes if "not measured for this row" in note)[2]
    assert f"–{missing}" in next(line for line in text.splitlines() if "REFERENCE" in line)


def test_better_only_if_the_interval_excludes_zero_and_holm_agrees():
    same = row("twin", 30.0, metrics=rows()[2].metrics)
    text = tables.to_markdown(tables.paired_table([*rows()[1:], same], "svdquant"))
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    assert "SVDQUANT" not in lines
    assert lines["LORAQ"].count("better") == 2 and "+" in lines["LORAQ"]
    assert lines["RTN"].count("worse") == 2
    assert "better" not in lines["TWIN"] and "+0.00 [0.00, 0.00]" in lines["TWIN"]


def test_many_claims_need_more_than_one_interval():
    generator = np.random.default_rng(11)
    base = row("svdquant", 30.0)
    values = np.asarray(base.metrics["psnr"]["per_image"])
    noisy = []
    for i in range(100):  # no true difference anywhere
        metrics = {"psnr": entry(values + generator.normal(0, 1, 64), "higher")}
        noisy.append(row(f"row{i}", 30.0, metrics=metrics))
    table = tables.paired_table([base, *noisy], "svdquant")
    cells = [line[3] for line in table.rows]
    assert sum(cell.lo > 0 or cell.hi < 0 for cell in cells) >= 2
    assert not any(cell.mark for cell in cells)


@pytest.mark.parametrize("size", [2, 8, 16, 32])
def test_few_images_give_no_verdict_and_the_table_says_so(size):
    values = np.random.default_rng(12).normal(30, 1, size)
    images = {"names": NAMES[:size], "seen": [True] * size, "hash": "h"}
    made = [
        row(name, 30.0, images=images, metrics={"psnr": entry(values + gain, "higher", size)})
        for name, gain in (("svdquant", 0), ("loraq", 5 + np.linspace(0, 0.1, size)))
    ]
    text = tables.to_markdown(tables.paired_table(made, "svdquant"))
    line = next(line for line in text.splitlines() if "LORAQ" in line)
    assert ("better" in line) == (size >= 32)
    assert ("too few images (N < 32) for a verdict" in text) == (size < 32)
    assert ("[" in line) == (size >= 8) and ("(N < 8) for an interval" in text) == (size < 8)


def test_one_claim_of_sixty_is_printed():
    base = row("svdquant", 30.0)
    others = [row(f"row{i}", 30.0, metrics=base.metrics) for i in range(59)]
    cells = [line[3] for line in tables.paired_table([*rows()[1:], *others], "svdquant").rows]
    assert [cell.mark for cell in cells] == ["worse", "better", *[""] * 59]


def test_paired_rows_must_share_prompts():
    other = row("other", 30.0, images={"names": NAMES[::-1], "seen": SEEN, "hash": "h"})
    with pytest.raises(LoraqError, match="same prompts"):
        tables.paired_table([other, row("svdquant", 30)], "svdquant")
    with pytest.raises(LoraqError, match="svdquant"):
        tables.paired_table(rows(), "svdquan")


def test_seen_and_held_out_rows():
    table = tables.splits_table(rows())
    assert [line[:3] for line in table.rows][:2] == [["RTN", "seen", 32], ["RTN", "held out", 32]]


def test_limits_table_has_the_rows_with_limits():
    assert "limits" not in tables.all_tables(rows(), "svdquant")
    with_limits = row(
        "loraq",
        31.0,
        analyses={"limits": {"gaussian": 0.05, "shannon": 0.04, "spectral": 0.03}},
    )
    table = tables.all_tables([*rows()[:-1], with_limits], "svdquant")["limits"]
    text = tables.to_markdown(table)
    assert len(table.rows) == 1 and "| LORAQ" in text
    assert [f"{v:.4f}" in text for v in (0.15, 0.05, 0.04, 0.03)] == [True] * 4


def test_identical_images_are_reported():
    record = rows()[3]
    record.metrics["psnr"]["details"].update(identical=3, cap=95.05)
    assert any("3 of 64 images" in note for note in tables.main_table([record]).notes)


def test_csv_has_ten_digits_and_latex_has_equal_columns():
    table = tables.main_table(rows(), "svdquant")
    read = list(csv.DictReader(io.StringIO(tables.to_csv(table))))
    assert float(read[3]["PSNR"]) == pytest.approx(rows()[3].metrics["psnr"]["value"], rel=1e-9)
    assert float(read[3]["KID (efflite0)"]) == 0.00125 and read[0]["PSNR"] == ""
    assert read[3]["bytes"] == "7654321"
    latex = tables.to_latex(table)
    body = [line for line in latex.splitlines() if not line.startswith("%")]
    assert {line.count(" & ") for line in body if "&" in line} == {len(table.columns) - 1}
    assert latex.isascii() or not any(mark in "\n".join(body) for mark in "↑↓×³–ᵃᵇ")


def test_tables_need_no_torch_and_are_quick(tmp_path):
    for record in rows():
        save_record(record, tmp_path / f"{record.row}.json")
    code = (
        "import sys, time; from loraq.results.tables import tables;"
        "r = tables.load_records([sys.argv[1]]);"
        "tables.write_tables(r, sys.argv[2], 'svdquant'); assert 'torch' not in sys.modules;"
        "assert time.process_time() < 5"  # the CPU's, as other processes may run
    )
    out = tmp_path / "tables"
    subprocess.run([sys.executable, "-c", code, str(tmp_path), str(out)], check=True)
    kinds = {
        f"{name}.{kind}" for name in ("main", "splits", "paired") for kind in ("md", "tex", "csv")
    }
    assert {path.name for path in out.iterdir()} == kinds


def test_markdown_stays_a_table_when_columns_are_narrow():
    text = tables.to_markdown(tables.Table("T", ["row", "N"], [["a", 4], ["b", 4]]))
    assert text.splitlines()[3] == "| --- | --: |"


def test_the_main_table_says_what_computed_its_metrics():
    def measured(name: str, version: str, **more) -> Record:
        made = row(name, 30)
        details = {"packages": {"torchmetrics": version}, **more}
        entry = {**made.metrics["psnr"], "version": "1", "details": details}
        return replace(made, metrics={**made.metrics, "psnr": entry})

    def notes(*records: Record) -> str:
        return " | ".join(tables.main_table(records).notes)

    one = measured("a", "1.9.0", backbone_sha256="62ad24a50f")
    same = measured("b", "1.9.0", backbone_sha256="62ad24a50f")
    text = notes(one, same)
    assert "computed by: PSNR ↑: version 1 (torchmetrics 1.9.0, backbone 62ad24a5)" in text
    assert "do not compare" not in text
    assert "computed by" not in notes(row("old", 30), row("older", 29))
    for other in (measured("b", "2.0.0"), row("b", 30)):
        assert "PSNR ↑: rows of different versions do not compare. A: " in notes(one, other)


def test_the_main_table_says_which_rows_ran_on_which_machine():
    old = {"device": "cpu", "processor": "x86_64", "cpus": 2, "system": "Linux"}
    one, two = replace(row("a", 30), machine=old), replace(row("b", 30), machine=old)
    assert not any("machine" in note for note in tables.main_table([one, two]).notes)
    two = replace(two, machine=old | {"model": "EPYC 9654"})
    (note,) = (note for note in tables.main_table([one, two]).notes if "machine" in note)
    assert "times of different machines do not compare" in note
    assert note.endswith("A: x86_64, 2 cpus (model not recorded); B: EPYC 9654, 2 cpus")


def test_labels_with_special_letters_stay_text_in_every_format(tmp_path):
    label = r"50% <b>_A*_ & `c` | $x^2$ {\d}"
    rows = [row("reference", 40), row("a", 30, label=label)]
    rows[1] = replace(rows[1], label=label)
    table = tables.write_tables(rows, tmp_path, "a") and (tmp_path / "main.md").read_text()
    assert r"50% \<b>_A\*_ & \`c\` / $x^2$ {\d}" in table
    latex = (tmp_path / "main.tex").read_text()
    assert r"50\% <b>\_A*\_ \& `c` / \$x\textasciicircum{}2\$ \{\textbackslash{}d\}" in latex


def test_a_line_break_does_not_leave_a_comment_of_latex():
    from loraq.results.tables.text import Table, to_latex

    made = to_latex(Table("a\n\\input{b}", ["x"], [["y"]], ["c\r\n\\input{d}"]))
    assert all("input" not in line or line.startswith("% ") for line in made.splitlines())
