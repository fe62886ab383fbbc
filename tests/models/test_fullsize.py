"""Full-size shapes from sharded snapshots: quantised from mapped files, group by group."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from safetensors.torch import load_file

from experiments.bench import calibrated, fullsize, make_fullsize, resume
from loraq import recipe
from loraq.cli import main
from loraq.compose import load_rows
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models import list_layers, load_pipeline
from loraq.models.mapped import mapped_transformer, remap, runs_as_stored
from loraq.models.pointwise import weight_matrix
from loraq.quantization.activations import Activations
from loraq.quantization.calibration import moments_from_tensors
from loraq.quantization.group_file import load_group
from loraq.quantization.quantizer import quantize_model
from loraq.runner.generate import image_batch
from loraq.runner.plan import plan_rows
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.store import Store
from loraq.utils.assets import ASSETS
from tests import forked

OF = ["model=pixart_sigma", *fullsize.FOLDER]


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory):
    """One block of PixArt-Σ's real width, in two shards."""
    folder = tmp_path_factory.mktemp("fullsize") / "pixart"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_fullsize, "SHARD_BYTES", 1 << 25)
        make_fullsize.write_snapshot("pixart_sigma", folder, blocks=1)
    return folder


@pytest.fixture
def forking(monkeypatch):
    """Commands that the benchmarks start are forked, so that they need not import everything."""
    popen = subprocess.Popen

    def start(command, **streams):
        if list(command[1:3]) == ["-m", "loraq.cli"]:
            return forked.Popen(command)
        return popen(command, **streams)

    monkeypatch.setattr(subprocess, "Popen", start)


def test_a_snapshot_is_sharded_heavy_tailed_and_the_same_again(snapshot, tmp_path):
    index = snapshot / "transformer" / f"{make_fullsize.STEM}.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    assert len(set(places.values())) > 1
    model = load_rows(["method=rtn", *OF, f"model.path={snapshot}"])[-1].model
    transformer = mapped_transformer(model)
    weight = transformer.transformer_blocks[0].attn1.to_q.weight
    assert weight.dtype == torch.float16 and weight.shape == (1152, 1152)
    name = "transformer_blocks.0.attn1.to_q.weight"
    again = make_fullsize.random_weight(name, weight.shape, seed=0)
    assert torch.equal(again.half(), weight)
    z = (again - again.mean()) / again.std()
    assert z.pow(4).mean() > 5  # a normal distribution has 3
    channels = again.norm(dim=0)
    assert channels.max() > 4 * channels.median()
    with pytest.raises(LoraqError, match="already exists"):
        make_fullsize.write_snapshot("pixart_sigma", snapshot)


def test_mapping_anew_changes_no_value_and_drops_no_layer(snapshot):
    model = load_rows(["method=rtn", *OF, f"model.path={snapshot}"])[-1].model
    transformer = mapped_transformer(model)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    held = mappings(snapshot)
    assert 0 < held <= len(list(snapshot.glob("transformer/*.safetensors")))
    remap(transformer, model)
    assert mappings(snapshot) == held
    new = transformer.transformer_blocks[0].ff.net[2].weight
    assert not new.requires_grad
    assert all(torch.equal(transformer.state_dict()[name], before[name]) for name in before)


def mappings(folder) -> int:
    """How often this process maps a file of the folder: once each, where nothing is kept alive."""
    gc.collect()
    return sum(str(folder) in line for line in Path("/proc/self/maps").read_text().splitlines())


def test_a_wider_file_gives_the_values_of_the_models_type(snapshot, tmp_path):
    """A float32 file for a float16 model: mapped as it is, quantised as what the pipeline holds."""
    wide = tmp_path / "wide"
    make_fullsize.write_snapshot("pixart_sigma", wide, blocks=1, float32=True)
    model = load_rows(["method=rtn", *OF, f"model.path={wide}"])[-1].model
    module = mapped_transformer(model).transformer_blocks[0].attn1.to_q
    narrow = load_rows(["method=rtn", *OF, f"model.path={snapshot}"])[-1].model
    assert module.weight.dtype == torch.float32
    same = mapped_transformer(narrow).transformer_blocks[0].attn1.to_q
    assert torch.equal(weight_matrix(module), weight_matrix(same))


def test_streaming_packs_the_same_layers(snapshot, tmp_path):
    """The command maps weights and finished layers; the values are those of a whole model."""
    settings = ["method=lqer", "quant.branch.rank=8"]
    main(["quantize", *settings, *OF, f"model.path={snapshot}", f"output={tmp_path}", "--quiet"])
    assert len(list(tmp_path.glob(fullsize.PACKED))) == 6  # q+k+v, both outputs, cross q, up, down
    streamed = packed_layers(tmp_path)
    transformer = PixArtTransformer2DModel.from_pretrained(snapshot / "transformer")
    layers = list_layers(transformer, "pixart_sigma")
    whole = quantize_model(transformer, layers, recipe("lqer", settings[1]), progress=None)
    assert set(streamed) == set(whole.layers)
    for name, layer in streamed.items():
        other = whole.layers[name]
        assert torch.equal(layer.weight.codes, other.weight.codes)
        assert torch.equal(layer.left.codes, other.left.codes)


def packed_layers(output):
    """What `loraq quantize` has written below the output folder, by layer."""
    groups = [load_group(path)[0] for path in output.glob(fullsize.PACKED)]
    return {name: layer for group in groups for name, layer in group.items()}


@pytest.mark.parametrize("name", ["tiny_pixart", "tiny_sana"])
def test_a_transformer_that_runs_as_it_is_stored_stays_in_its_files(name, tmp_path):
    """The embedded models lie in bfloat16: in that type the pipeline maps them, with equal bits."""
    for dtype, stays in (("bfloat16", True), ("float32", False)):
        config = load_rows(["method=rtn", f"model={name}", f"model.dtype={dtype}", "device=cpu"])[
            -1
        ]
        store = Store(tmp_path / dtype)
        (row,) = plan_rows([config], store, last=Stage.QUANTIZED)
        session, own = (
            Session(store, progress=False),
            load_pipeline(config.model, without=("text_encoder",)),
        )
        before = mappings(ASSETS / name / "transformer")
        pipe = session.pipe(row, text=False)
        assert (mappings(ASSETS / name / "transformer") > before) == stays
        assert session.denoiser(row) is pipe.transformer
        assert (session.release(row) is not None) == stays
        states = pipe.transformer.state_dict(), own.transformer.state_dict()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        mapped, read = (latents(p, config.model).float() for p in (pipe, own))
        if dtype == "float32":
            assert torch.equal(mapped, read)
        else:  # some processors' bfloat16 products depend on where the operands lie in memory
            assert (mapped - read).norm() < 0.05 * read.norm()


def test_files_with_which_something_is_wrong_are_not_mapped_and_loading_says_what(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(ASSETS / "tiny_pixart", folder)
    (folder / "SHA256SUMS").unlink()
    overrides = ["method=rtn", "model=tiny_pixart", "model.dtype=bfloat16"]
    model = load_rows([*overrides, f"model.path={folder}"])[-1].model
    assert runs_as_stored(model)
    assert not runs_as_stored(replace(model, dtype="float16"))
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    assert not runs_as_stored(model)
    with pytest.raises(LoraqError, match="truncated"):
        load_pipeline(model)
    (folder / "transformer" / "config.json").unlink()
    assert not runs_as_stored(model)


def latents(pipe, model):
    """One step from embeddings of noise."""
    width = pipe.transformer.config.caption_channels
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, model.max_sequence_length, width, generator=g).to(pipe.dtype)
    seen = torch.ones(1, model.max_sequence_length, dtype=torch.int64)
    names = ("prompt_embeds", "negative_prompt_embeds")
    text = dict(zip(names, noise, strict=True))
    text |= {"prompt_attention_mask": seen, "negative_prompt_attention_mask": seen}
    prompts = [Prompt("a", "nothing")]
    return image_batch(pipe, replace(model, steps=1), prompts, 0, "latent", embeddings=text)


def test_calibrated_methods_read_mapped_weights_and_mapped_activations(
    snapshot, forking, tmp_path, capsys, monkeypatch
):
    """`calibrated` runs captions to packed layers; the layers are those of a whole model.

    GPTQ over inputs of 4608 channels takes most of the time: the bench measures half the width, and
    the layers that are compared have 1152.
    """
    half = {"num_attention_heads": 8, "cross_attention_dim": 576}
    whole_width = make_fullsize.CONFIGS["pixart_sigma"]
    monkeypatch.setitem(make_fullsize.CONFIGS, "pixart_sigma", whole_width | half)
    found = tmp_path / "calibrated.json"
    asked = ["--blocks", "1", "--methods", "gptq", "--steps", "1", "--output", str(found)]
    asked += ["--size", "256"]
    calibrated.main(["pixart_sigma", *asked])
    (row,) = json.loads(found.read_text())["rows"]
    assert 0 < row["peak_above_torch_bytes"] < 3 << 29
    assert row["activation_bytes"] > 4 * (5 * 576**2 + 2304**2)  # second moments of six inputs
    capsys.readouterr()
    calibrated.main(["pixart_sigma", *asked])
    assert not capsys.readouterr().out  # the record holds it already
    with pytest.raises(LoraqError, match="steps=1, but 2 is requested"):
        calibrated.main(["pixart_sigma", *asked, "--steps", "2"])

    small = ["model.height=64", "model.width=64", "model.steps=1", "calibration.prompts=2"]
    skip = ["cross_k", "cross_v", "ff_down"]
    gptq = ["method=gptq", f"quant.skip=[{','.join(skip)}]"]
    main(
        ["quantize", *gptq, *OF, f"model.path={snapshot}", f"output={tmp_path}", *small, "--quiet"]
    )
    transformer = PixArtTransformer2DModel.from_pretrained(snapshot / "transformer")
    files = tmp_path.glob("moments/*/*.safetensors")
    moments = moments_from_tensors(
        {name: x for path in files for name, x in load_file(path).items()}
    )
    layers, made = list_layers(transformer, "pixart_sigma", skip), recipe("gptq")
    read = Activations(moments=moments)
    whole = quantize_model(transformer, layers, made, read, progress=None)
    streamed = packed_layers(tmp_path)
    assert set(streamed) == set(whole.layers)
    for name, layer in streamed.items():
        assert torch.equal(layer.weight.codes, whole.layers[name].weight.codes)


def test_the_benches_measure_the_command_and_keep_what_they_have_measured(
    snapshot, forking, tmp_path, capsys
):
    """Seconds and memory of a row; a row that the record holds is not made again."""
    asked = ["pixart_sigma", str(snapshot), "--methods", "rtn", "--formats", "int4"]
    asked += ["--output", str(tmp_path / "fullsize.json")]
    fullsize.main(asked)
    (row,) = json.loads((tmp_path / "fullsize.json").read_text())["rows"]
    assert 0.01 < row["group_seconds"] < row["wall_seconds"]
    assert 0 < row["peak_above_torch_bytes"] < 3 << 29 and row["file_bytes"] > 1e6
    capsys.readouterr()
    before = (tmp_path / "fullsize.json").read_bytes()
    fullsize.main(asked)
    assert (tmp_path / "fullsize.json").read_bytes() == before and not capsys.readouterr().out


def test_a_killed_run_ends_in_an_undisturbed_ones_bytes(snapshot, forking, tmp_path):
    found = tmp_path / "resume.json"
    asked = ["--method", "lqer", "--kills", "1", "--output", str(found)]
    resume.main(["pixart_sigma", str(snapshot), *asked])
    record = json.loads(found.read_text())
    assert record["identical"] and record["kept"]
    assert 0 < record["kills"][0]["files"] < record["settings"]["files"] == 6
