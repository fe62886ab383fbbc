"""The committed demos remade in part on the embedded models: the code must still say its numbers.

Tolerances: bits and ranks exactly; mean weight errors within 0.1 % (a code on a rounding boundary
may flip between processors); each remade image within 0.02 of its recorded alignment (a matching
caption scores about 0.2 above a wrong one; differences in the last bits stay far below). An image
does not depend on the others of its batch (tests/runner/test_generate.py), so that few are remade.
"""

from __future__ import annotations

import pytest

from loraq.config import ModelConfig, Recipe
from loraq.config.convert import from_plain
from loraq.models import list_layers, load_pipeline, weights_hash
from loraq.models.pointwise import weight_matrix
from loraq.quantization.quantizer import quantize_model
from loraq.results import committed

DATA_FREE = ("rtn", "loraq_o2_int8", "loraq_o2_w4a8")
REMADE = 4
"""Images of each model; one takes 1.5 s."""


@pytest.fixture(scope="module", params=["demo", "demo-tiny_sana"])
def demo(request):
    return {record.row: record for record in committed.read_results(request.param).records}


@pytest.fixture(scope="module")
def model(demo) -> ModelConfig:
    return from_plain(ModelConfig, demo["reference"].config["model"])


@pytest.fixture(scope="module")
def pipe(model):
    return load_pipeline(model, "cpu")


def test_the_records_are_of_the_model_that_is_embedded(demo, model):
    assert {record.model_hash for record in demo.values()} == {weights_hash(model)}


@pytest.mark.parametrize("row", DATA_FREE)
def test_quantising_again_gives_the_recorded_errors(row, demo, model, pipe):
    """Of every second block where a branch is searched for, which takes long; blocks are equal."""
    record = demo[row]
    recipe = from_plain(Recipe, record.config["quant"])
    layers, every = list_layers(pipe.transformer, model.family, recipe.skip), 1
    if row != "rtn":
        every, layers = 2, [la for la in layers if int(la.name.split(".")[1]) % 2]
    made = quantize_model(pipe.transformer, layers, recipe, progress=None)
    assert made.bits_per_weight == record.budget["bits_per_weight"]
    assert every * made.nbytes == record.budget["nbytes"]
    assert every * len(layers) == len(record.layers)
    assert record.budget["rank"] == (made.rank or None)
    errors, entries = [], [entry for entry in record.layers if entry["layer"] in made.layers]
    for entry in entries:
        w_OI = weight_matrix(pipe.transformer.get_submodule(entry["layer"])).float()
        estimate = made.layers[entry["layer"]].effective_weight()
        errors.append(((estimate - w_OI).norm() / w_OI.norm()).item())
    recorded = [entry["weight_error"] for entry in entries]
    assert sum(errors) / len(errors) == pytest.approx(sum(recorded) / len(recorded), rel=1e-3)


def test_the_first_16_bit_images_are_the_recorded_ones(demo, model, pipe, tmp_path):
    from loraq import metrics
    from loraq.config import GenerateConfig
    from loraq.data import Prompt
    from loraq.runner.generate import generate_images

    record = demo["reference"]
    captions = _captions()
    prompts = [Prompt(**captions[name]) for name in record.images["names"][:REMADE]]
    settings = GenerateConfig(REMADE, record.config["generate"]["seed"])
    paths = generate_images(pipe, model, prompts, settings, tmp_path, progress=None)
    images = metrics.ImageSet.of_prompts(paths, prompts)
    scores = metrics.compute("alignment", images).per_image
    assert scores == pytest.approx(record.metrics["alignment"]["per_image"][:REMADE], abs=0.02)


def _captions() -> dict[str, dict]:
    import json

    from loraq.utils.assets import resolve_asset

    splits = json.loads(resolve_asset("asset:captions.json").read_text())
    return {entry["name"]: entry for entry in splits["test"]}
