"""The stand-ins for full-size models, at small widths, from quantising to an image."""

from __future__ import annotations

import pytest

from experiments.bench import fullsize, make_fullsize
from loraq.runner.experiment import run

WIDTHS = {
    "pixart_sigma": {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "cross_attention_dim": 48,
        "caption_channels": 64,
    },
    "sana_1_6b": {
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 24,
        "cross_attention_dim": 48,
        "caption_channels": 64,
    },
}
"""Settings of the transformers that take the time; latents, patches and all else stay."""


@pytest.mark.parametrize("name", WIDTHS)
def test_a_stand_in_goes_from_quantising_to_an_image(name, tmp_path, overrides, monkeypatch):
    """SANA's decoder had 8 channels for 32 latents, and failed on the first image."""
    config = make_fullsize.CONFIGS[name] | WIDTHS[name]
    monkeypatch.setitem(make_fullsize.CONFIGS, name, config)
    make_fullsize.write_snapshot(name, tmp_path / name, blocks=1)
    of = [f"model={name}", "model.domain=null", *fullsize.FOLDER, *overrides]
    short = ["method=lqer", "quant.branch.rank=4", "data.count=1", "model.steps=1"]
    outcome = run([*of, f"model.path={tmp_path / name}", *short], progress=False)
    row = outcome.records[-1]
    assert len(row.layers) == {"pixart_sigma": 8, "sana_1_6b": 8}[name]
    assert all(entry["output_error"] < 1 for entry in row.layers)
    assert "one_colour" not in row.images and 5 < row.metrics["psnr"]["value"] < 90
