"""Estimates of runs that nobody has timed: against the roofline's record, and against products."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from experiments.bench.hub_layout import write_layout
from experiments.bench.roofline import hub_rows
from loraq.cli import main
from loraq.runner.estimate import dry_run
from loraq.runner.forecast import forecast, image_seconds
from loraq.runner.rows import Stage
from loraq.utils.assets import CHECKOUT
from loraq.utils.rates import CPU, DEVICES, UNKNOWN

ROOFLINE = json.loads((CHECKOUT / "results" / "bench" / "roofline.json").read_text())
H100 = DEVICES["H100"]


@pytest.fixture(scope="module")
def layout(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "pixart"
    write_layout("pixart_sigma", folder)
    return folder


@pytest.mark.parametrize(("method", "way"), [("rtn", "RTN"), ("loraq_best", "loraq_best")])
def test_images_of_a_hub_layout_take_the_rooflines_time(layout, method, way):
    """Within a factor of 1.5; it was 30. The decoding of an image comes to the steps."""
    reference, row = hub_rows("pixart_sigma", layout, f"method={method}")
    for made, name, quantisers in ((reference, "16-bit", "–"), (row, way, "fused")):
        (found,) = (
            entry
            for entry in ROOFLINE["rows"]
            if (entry["model"], entry["way"], entry["quantisers"])
            == ("pixart_sigma", name, quantisers)
        )
        expected = 20 * found["seconds"]["H100"] / 16
        assert expected <= image_seconds(made, H100) <= 1.5 * expected
    assert image_seconds(row, UNKNOWN) > 3 * image_seconds(row, H100)


def test_sizes_of_products_come_from_shapes(layout):
    """The inputs of all layers of PixArt-Σ take 1.3 GB, as its packed layers' 0.3; 100 MB were
    stated."""
    (*_, row) = hub_rows("pixart_sigma", layout, "method=svdquant")
    widths = 28 * (6 * 1152 + 4608)
    assert forecast(row, Stage.MEASURING_INPUTS, H100)[1] == 2 * 2048 * widths
    record = json.loads((CHECKOUT / "results/bench/fullsize_pixart_sigma.json").read_text())
    (*_, row) = hub_rows("pixart_sigma", layout, "method=loraq_o2")
    (measured,) = (
        entry["file_bytes"]
        for entry in record["rows"]
        if (entry["format"], entry["method"]) == ("int4", "loraq_o2")
    )
    assert forecast(row, Stage.QUANTIZED, H100)[1] == pytest.approx(measured, rel=0.02)


def test_sizes_of_a_small_run_are_those_of_its_products(overrides, tmp_path, capsys):
    """What the plan states of packed layers and embeddings is what the run writes."""
    settings = ["method=lqer", *overrides]
    plan = dry_run(settings)
    assert f"modelled for {CPU.name}" in plan
    main(["run", *settings, "--quiet"])
    stated = {}
    for line in plan.splitlines():
        if " MB (" in line:
            stage, _, size = line.split()[0], *line.split(" MB (")[0].rsplit(" ", 1)
            stated[stage] = float(size)
    made = {
        folder: sum(path.stat().st_size for path in (tmp_path / "outputs" / folder).rglob("*"))
        for folder in ("quantised", "embeddings")
    }
    assert stated["quantised"] == pytest.approx(made["quantised"] / 1e6, rel=0.5, abs=0.1)
    assert made["embeddings"] / 1e6 <= stated["embeddings"] + 0.1


def test_every_stage_has_a_forecast_on_every_device(overrides):
    from loraq.compose import load_rows
    from loraq.runner.product_keys import make_row

    row = make_row(load_rows(["method=svdquant", *overrides])[-1])
    for device, rates in (("cpu", CPU), ("cuda", UNKNOWN), ("cuda", H100)):
        for stage in Stage:
            seconds, size = forecast(replace(row, device=device), stage, rates)
            assert 0 <= seconds < 3600 and 0 <= size < 1e9


def test_measuring_takes_a_step_of_every_role_only_if_steps_are_analysed(layout):
    """With a GPU, the metrics themselves take what eight threads need to read 1,664 images."""
    (*_, plain) = hub_rows("pixart_sigma", layout, "method=rtn")
    (*_, steps) = hub_rows("pixart_sigma", layout, "method=rtn", "metrics.analyses=[steps]")
    assert len(plain.prompts) == 128 and len(plain.config.metrics.names) == 9
    seconds = [forecast(row, Stage.MEASURED, H100)[0] for row in (plain, steps)]
    assert seconds[0] == pytest.approx(128 * 13 * 0.05 * 1.024**2 / 8, rel=0.01)
    images = 16 * 8 * image_seconds(plain, H100)  # eight roles
    assert 0.7 * images < seconds[1] - seconds[0] < 1.5 * images


def test_every_setting_that_decides_the_rank_decides_the_time(layout):
    """Results are cached by the settings that a forward depends on."""

    def seconds(*overrides: str) -> float:
        (*_, row) = hub_rows("pixart_sigma", layout, "method=loraq_o2", *overrides)
        return image_seconds(row, H100)

    by_memory = [
        seconds("quant.branch.budget=null", f"quant.branch.budget_rank={r}") for r in (8, 64)
    ]
    assert by_memory[0] < by_memory[1]
    assert seconds("quant.branch.share_qkv=true") != seconds("quant.branch.share_qkv=false")
