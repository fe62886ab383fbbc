"""Published models built from their configurations alone, on the meta device."""

from __future__ import annotations

import json

import pytest

from tests import published


@pytest.mark.parametrize("name", published.names())
def test_the_denoisers_have_the_published_number_of_parameters(name):
    denoisers = published.denoisers(name).values()
    count = sum(p.numel() for denoiser in denoisers for p in denoiser.parameters())
    assert count == pytest.approx(published.source(name)["denoiser_parameters"], rel=0.05)


@pytest.mark.parametrize("name", published.names())
def test_every_network_of_a_published_pipeline_has_its_configuration(name):
    folder = published.FOLDER / name
    index = json.loads((folder / "model_index.json").read_text())
    for part, entry in index.items():
        if isinstance(entry, list) and entry[0] and not part.startswith("tokenizer"):
            file = "scheduler_config.json" if part == "scheduler" else "config.json"
            assert (folder / part / file).is_file(), part
