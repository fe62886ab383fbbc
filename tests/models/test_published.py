"""Published models built from their configurations alone, on the meta device."""

from __future__ import annotations

import json

import pytest

from tests import published


@pytest.mark.parametrize("name", published.names())
def test_the_denoisers_have_the_published_number_of_parameters(name):
    """With stored buffers, as in a checkpoint's size: SD3.5's table of positions is large."""
    denoisers = published.denoisers(name).values()
    count = sum(t.numel() for denoiser in denoisers for t in denoiser.state_dict().values())
    assert count == pytest.approx(published.source(name)["denoiser_parameters"], rel=0.05)


@pytest.mark.parametrize("name", published.names())
def test_every_network_of_a_published_pipeline_has_its_configuration(name):
    folder = published.FOLDER / name
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] and not part.startswith("tokenizer"):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            assert (folder / part / file).is_file(), part
