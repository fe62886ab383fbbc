"""`model=hub`: what a configuration leaves open is read from the model's files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import pytest

from loraq.compose import load_rows
from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.models.call import check_model_call
from loraq.models.contents import check_contents
from loraq.models.defaults import with_defaults
from loraq.models.loading import check_size, image_parts, latent_sizes, text_parts
from loraq.models.skeleton import SPATIAL, TEMPORAL
from loraq.models.source import pipeline_of
from tests import pipelines, published


def of_folder(folder: Path, **settings) -> ModelConfig:
    """A model of which nothing but its folder is given."""
    sampling = ("height", "width", "steps", "guidance", "max_sequence_length")
    given = {"name": "auto", "path": str(folder), **dict.fromkeys(sampling), **settings}
    return ModelConfig(**given)


def published_model(folder: str, **settings) -> ModelConfig:
    return with_defaults(of_folder(published.FOLDER / folder, **settings))


@pytest.fixture
def indexed(tmp_path):
    """A folder with no more than a `model_index.json` of these entries."""

    def write(**entries) -> Path:
        (tmp_path / "model_index.json").write_text(json.dumps(entries))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("name", "size", "steps", "guidance", "length"),
    [
        ("flux_1_dev", (1024, 1024), 28, 3.5, 512),
        ("qwen_image", (1024, 1024), 50, None, 512),
        ("z_image_turbo", (1024, 1024), 50, 5.0, 512),
        ("sd3_5_medium", (1024, 1024), 28, 7.0, 256),
        ("wan_2_2_t2v_a14b", (480, 832), 50, 5.0, 512),
        ("stable_audio_open", None, 100, 7.0, None),
    ],
)
def test_what_is_left_open_comes_from_the_pipeline(name, size, steps, guidance, length):
    model = published_model(name)
    found = model.size, model.steps, model.guidance, model.max_sequence_length
    assert found == (size, steps, guidance, length)
    assert model.name == name and model.family != "auto"
    assert with_defaults(model) == model


def test_what_is_given_stays():
    model = published_model("flux_1_dev", name="mine", family="generic", steps=4, height=512)
    assert (model.name, model.family, model.steps) == ("mine", "generic", 4)
    assert model.size == (512, 1024)


def test_the_class_chooses_the_family():
    assert published_model("pixart_sigma").family == "pixart_sigma"
    rows = load_rows([*pipelines.overrides("aura_flow"), "method=rtn"])
    assert {row.model.family for row in rows} == {"generic"}
    assert rows[-1].model.name == "aura_flow"


def test_parts_are_told_apart_by_what_they_are():
    flux, audio = (published_model(name) for name in ("flux_1_dev", "stable_audio_open"))
    assert text_parts(flux) == ("text_encoder", "text_encoder_2")
    assert image_parts(flux) == ("transformer", "vae")
    assert text_parts(audio) == ("text_encoder",)  # its call reads the projection model
    both = image_parts(published_model("wan_2_2_t2v_a14b"))
    assert both == ("transformer", "transformer_2", "vae")
    assert image_parts(published_model("wan_2_2_ti2v_5b")) == ("transformer", "vae")


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("flux_1_dev", {"height": 1000}, r"model\.height=1000 is no multiple of 16.*height=9\d\d"),
        ("wan_2_2_ti2v_5b", {"width": 848}, r"model\.width=848 is no multiple of 32"),
        ("ltx_video", {"height": 500}, r"model\.height=500 is no multiple of 32"),
        ("wan_2_2_t2v_a14b", {"call": {"num_frames": 80}}, r"num_frames=80: .*num_frames=81,"),
        ("ltx_video", {"call": {"num_frames": 60}}, r"num_frames=60: .*num_frames=57,"),
    ],
)
def test_a_size_that_the_pipeline_would_change_is_refused(name, settings, message):
    with pytest.raises(LoraqError, match=message):
        check_size(published_model(name, **settings))


@pytest.mark.parametrize("name", published.names())
def test_the_default_size_of_a_published_model_fits(name):
    check_size(published_model(name))


MOCHI = ("MochiPipeline", "MochiTransformer3DModel", "AutoencoderKLMochi")
SANA_VIDEO = ("SanaVideoPipeline", "SanaVideoTransformer3DModel", "AutoencoderKLWan")
LATTE = ("LattePipeline", "LatteTransformer3DModel", "AutoencoderKL")
NEEDED = {LATTE[1]: {"in_channels": 4, "patch_size": 2, "caption_channels": 16}}
"""Settings without a default."""


@pytest.fixture
def of_classes(tmp_path):
    """The model of a folder with a pipeline of these classes and their default configurations."""

    def write(pipeline, transformer, vae, **settings) -> ModelConfig:
        listed = {"transformer": transformer, "vae": vae}
        index = {name: ["diffusers", kind] for name, kind in listed.items()}
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": pipeline, **index}))
        for name, kind in listed.items():
            (tmp_path / name).mkdir()
            values = {"_class_name": kind, **NEEDED.get(kind, {})}
            (tmp_path / name / "config.json").write_text(json.dumps(values))
        return with_defaults(of_folder(tmp_path, **settings))

    return write


@pytest.mark.parametrize(
    ("classes", "settings", "sizes"),
    [
        (MOCHI, {}, (4, 60, 106)),
        (MOCHI, {"call": {"num_frames": 31}, "width": 96}, (6, 60, 12)),
        (SANA_VIDEO, {"call": {"frames": 9}}, (3, 60, 104)),
        (LATTE, {}, (16, 512, 512)),
    ],
)
def test_latents_of_a_video_by_any_name_of_its_frames(classes, settings, sizes, of_classes):
    assert latent_sizes(of_classes(*classes, **settings)) == sizes


@pytest.mark.parametrize(
    ("classes", "settings", "message"),
    [
        (MOCHI, {"width": 100}, r"model\.width=100 is no multiple of 16"),
        (MOCHI, {"call": {"num_frames": 24}}, r"num_frames=24: .* 6 frames.*num_frames=25,"),
        (SANA_VIDEO, {"call": {"frames": 80}}, r"call\.frames=80: .* 4 frames.*frames=81,"),
    ],
)
def test_a_video_is_refused_by_any_name_of_its_factors(classes, settings, message, of_classes):
    with pytest.raises(LoraqError, match=message):
        check_size(of_classes(*classes, **settings))


def test_every_name_of_a_factor_of_an_autoencoder_is_known():
    """In all of diffusers; an unknown one leaves sizes unchecked and latents uncounted."""
    sources = (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py")
    name = re.compile(r"self\.(vae_\w*(?:scale_factor|compression_ratio)\w*) =")
    found = {match for source in sources for match in name.findall(source.read_text("utf-8"))}
    assert found == {*SPATIAL, *TEMPORAL}


def test_a_setting_without_an_argument_is_refused():
    model = published_model("stable_audio_open", height=512)
    with pytest.raises(LoraqError, match=r"model\.height=512: .* has no height.*height=null"):
        check_model_call(pipeline_of(model), model)


@pytest.mark.parametrize(
    ("class_name", "message"),
    [
        ("FluxPipline", r"is a FluxPipline, which diffusers .* did you mean FluxPipeline"),
        (["pipeline", "MyPipeline"], r"names no class of diffusers .* code of its own"),
        ("StableDiffusionXLPipeline", r"denoises with a UNet.*whose pipeline has a transformer"),
    ],
)
def test_a_pipeline_that_cannot_be_used_is_refused(class_name, message, indexed):
    model = of_folder(indexed(_class_name=class_name))
    with pytest.raises(LoraqError, match=f"(?is){message}"):
        check_contents(with_defaults(model))


def test_a_pipeline_without_prompts_is_refused(indexed):
    model = with_defaults(of_folder(indexed(_class_name="DiTPipeline")))
    with pytest.raises(LoraqError, match=r"A DiTPipeline takes no prompt.*loraq\.quantize\(pipe\)"):
        check_model_call(pipeline_of(model), model)


def test_a_pipeline_without_a_component_that_it_needs_is_refused(tmp_path):
    folder = shutil.copytree(pipelines.little_folder("flux"), tmp_path / "flux")
    index = json.loads((folder / "model_index.json").read_text())
    index["text_encoder_2"] = [None, None]
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(LoraqError, match="lists no text_encoder_2"):
        check_contents(with_defaults(of_folder(folder)))


def test_a_file_of_another_model_is_refused_for_a_folder_with_the_remedy():
    """`model=tiny_pixart model.path=FLUX` complained about an argument of the call."""
    folder = pipelines.little_folder("flux")
    model = load_rows([f"model.path={folder}", "method=rtn"])[-1].model
    with pytest.raises(LoraqError, match=r"is a FluxPipeline; family 'pixart_sigma'.*model=hub"):
        check_model_call(pipeline_of(model), model)
