"""Models of the hub: which files of a published layout are fetched, read, or named as missing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loraq.compose import load_rows
from loraq.errors import DiskFullError, LoraqError
from loraq.metrics.common.published import IMAGE_REWARD
from loraq.models import load_pipeline, resolve_folder, weights_hash
from loraq.models.defaults import with_defaults
from loraq.models.mapped import mapped_transformer
from loraq.runner.estimate import dry_run
from loraq.runner.experiment import run, run_until
from loraq.runner.product_keys import make_row
from loraq.runner.rows import Stage
from tests.data.hub import COMMIT, Hub, serving
from tests.little import little_config
from tests.models.published import (
    NETWORK,
    PICKLED,
    PIXART,
    TEXT,
    VAE,
    published,
    sana,
    shards,
    variant_only,
)

OTHER = "89abcdef0123456789abcdef0123456789abcdef"
TO_K = "transformer_blocks.0.attn1.to_k.weight"
Open = Callable[[Sequence[str], bool], contextlib.AbstractContextManager[Hub]]


@pytest.fixture
def serve(tmp_path, tiny_folder, sana_folder, monkeypatch) -> Open:
    """Serve the little PixArt or SANA as owner/little, its weights under the given names."""

    @contextlib.contextmanager
    def opened(weights: Sequence[str], is_sana: bool = True) -> Iterator[Hub]:
        files = published(sana_folder if is_sana else tiny_folder, weights)
        with serving("owner/little", files, "models") as hub:
            constants = "huggingface_hub.constants"
            monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
            monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
            template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
            monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
            yield hub

    return opened


def model_of(is_sana: bool = True, **settings):
    call = {"use_resolution_binning": False, "clean_caption": False}
    family = {"family": "sana", "dtype": "bfloat16"} if is_sana else {}
    return little_config(**{"hub_id": "owner/little", "call": call, **family, **settings})


def weights_of(hub: Hub) -> set[str]:
    """The weight files that were downloaded."""
    return {name for name, _ in hub.ranges if name.endswith((".safetensors", ".bin"))}


def only_weights(names: Sequence[str]) -> set[str]:
    return {name for name in names if name.endswith(".safetensors")}


BF16 = {*shards(TEXT, 2, "bf16")[:2], f"{NETWORK}.bf16.safetensors", f"{VAE}.bf16.safetensors"}
FLOAT32 = {*shards(TEXT, 2)[:2], *shards(NETWORK, 2)[:2], f"{VAE}.safetensors"}
MIXED = (*shards(TEXT, 2), f"{NETWORK}.bf16.safetensors", f"{VAE}.safetensors")


@pytest.mark.parametrize(
    ("layout", "variant", "read"),
    [
        (sana("bf16"), "bf16", BF16),
        (sana("bf16"), None, FLOAT32),
        (variant_only("bf16"), "bf16", only_weights(variant_only("bf16"))),
        (MIXED, "bf16", only_weights(MIXED)),
    ],
    ids=["bf16 beside float32", "float32 beside bf16", "bf16 alone", "bf16 of one part"],
)
def test_what_the_pipeline_reads_is_fetched_and_nothing_else(
    layout, variant, read, serve, sana_folder
):
    """SANA's float32 shards were fetched beside its bf16 files and its int4 file, and read."""
    model = model_of(variant=variant)
    with serve(layout) as hub:
        folder = resolve_folder(model)
        assert weights_of(hub) == read
        hub.ranges.clear()
        assert resolve_folder(model) == folder and not hub.ranges
    pipe = load_pipeline(model)
    for part, network in (("transformer", pipe.transformer), ("text_encoder", pipe.text_encoder)):
        (file,) = (sana_folder / part).glob("*.safetensors")
        name = {"transformer": TO_K, "text_encoder": "layers.0.self_attn.k_proj.weight"}[part]
        scale = 2 if any(n.startswith(f"{part}/") and ".bf16" in n for n in read) else 1
        assert torch.equal(network.state_dict()[name], scale * load_file(file)[name].bfloat16())
    mapped = mapped_transformer(model).state_dict()[TO_K].bfloat16()
    assert torch.equal(mapped, pipe.transformer.state_dict()[TO_K])


def test_a_full_copy_of_the_repository_has_the_hash_of_what_was_fetched(serve, tmp_path):
    with serve(sana("bf16")) as hub:
        fetched = {v: weights_hash(model_of(variant=v)) for v in ("bf16", None)}
        for name, data in hub.files.items():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "copy" / name).write_bytes(data)
    assert fetched["bf16"] != fetched[None]
    for variant, expected in fetched.items():
        own = model_of(variant=variant, hub_id=None, path=str(tmp_path / "copy"))
        assert weights_hash(own) == expected


@pytest.mark.parametrize(
    ("layout", "settings", "words"),
    [
        (variant_only("fp16"), {}, "'text_encoder/model.safetensors' is missing; .*variant=fp16"),
        (sana("fp16"), {"variant": "fp32"}, "no weight file has this variant.*: fp16, int4"),
        (PICKLED, {}, "'pytorch_model.bin' is pickled.*safe_serialization=True"),
        (sana("bf16"), {"call": {"clean_captions": True}}, "Did you mean 'clean_caption'"),
        (sana("bf16"), {"revision": "mian"}, "revision=mian: .*no such commit.*It has main"),
        (sana("bf16"), {"hub_id": "owner/lost"}, "hub_id=owner/lost: .*no such repository.*log in"),
    ],
    ids=["variants alone", "another variant", "pickled", "call", "revision", "repository"],
)
def test_what_cannot_be_read_is_refused_before_weights_are_fetched(layout, settings, words, serve):
    with serve(layout) as hub:
        with pytest.raises(LoraqError, match=f"(?s){words}"):
            weights_hash(model_of(**settings))
        assert not weights_of(hub)


def test_a_model_for_which_the_disk_has_no_room_is_not_begun(serve):
    with serve(sana("bf16")) as hub:
        hub.stated = {f"{NETWORK}.bf16.safetensors": 10**18}
        with pytest.raises(DiskFullError, match=r"1000000000 GB are needed.*set HF_HOME=FOLDER"):
            resolve_folder(model_of(variant="bf16"))
        assert not weights_of(hub)


def cut_download(folder: Path) -> None:
    """A shard that is missing, and a link whose target never came, as interruptions leave them."""
    shard, link = folder / shards(TEXT, 2, "bf16")[1], folder / f"{NETWORK}.bf16.safetensors"
    for path in (shard, link):
        path.resolve().unlink()  # the blob
        path.unlink()
    link.symlink_to("../../../blobs/of-an-interrupted-download")
    (folder.parents[1] / "blobs" / "0a1b2c3d.incomplete").write_bytes(b"0" * 3_000_000)


def test_a_half_filled_cache_is_named_with_the_command_that_completes_it(serve, monkeypatch):
    model = model_of(variant="bf16")
    missing = [shards(TEXT, 2, "bf16")[1], f"{NETWORK}.bf16.safetensors"]
    with serve(sana("bf16")) as hub:
        folder = resolve_folder(model)
        cut_download(folder)
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(LoraqError) as caught:
            weights_hash(model)
        said = str(caught.value)
        assert f"{missing[0]} is missing; {missing[1]} is a link" in said
        assert "1 interrupted download (3.0 MB in blobs/)" in said
        command = f"hf download owner/little {' '.join(missing)} --revision {COMMIT}"
        assert said.splitlines()[-1].strip() == command
        monkeypatch.delenv("HF_HUB_OFFLINE")
        hub.ranges.clear()
        assert resolve_folder(model) == folder and weights_of(hub) == set(missing)
        (folder / f"{NETWORK}.bf16.safetensors").unlink()  # not even its name is here any more
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(LoraqError, match=f"{NETWORK}.bf16.safetensors is missing"):
            resolve_folder(model)


def test_without_a_snapshot_the_command_fetches_the_variant(serve, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with serve(sana("bf16")), pytest.raises(LoraqError) as caught:
        resolve_folder(model_of(variant="bf16", revision="v2"))
    command = "hf download owner/little --revision v2 --include '*.json' --include '*.model'"
    end = " --include '*.txt' --include '*.jinja' --include '*.bf16*.safetensors'"
    assert str(caught.value).splitlines()[-1].strip() == command + end


def test_what_is_left_to_a_model_of_the_hub_is_read_from_its_small_files(serve, monkeypatch):
    sampling = dict.fromkeys(("height", "width", "steps", "guidance", "max_sequence_length"))
    model = model_of(family="auto", name="auto", **sampling)
    with serve(sana("bf16")) as hub:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(LoraqError, match=r"(?s)not in the local hub cache.*hf download"):
            with_defaults(model)
        monkeypatch.delenv("HF_HUB_OFFLINE")
        found = with_defaults(model)
        assert not weights_of(hub)
        hub.ranges.clear()
        assert with_defaults(model) == found and not hub.ranges  # now in the cache
    assert (found.name, found.family) == ("little", "sana")
    assert (found.steps, found.guidance, found.size) == (20, 4.5, (1024, 1024))


@pytest.fixture
def hub_overrides(overrides) -> list[str]:
    """`overrides` with the model of the hub."""
    return ["method=rtn", *overrides, "model.path=null", "model.hub_id=owner/little"]


def test_the_plan_lists_what_a_run_fetches_and_fetches_none_of_it(serve, hub_overrides):
    with serve(PIXART, False) as hub:
        plan = dry_run(hub_overrides)
        assert not weights_of(hub)
        sizes = {name: len(hub.files[name]) for name in only_weights(PIXART)}
    head, *listed, last = plan.splitlines()
    total = f"{sum(sizes.values()) / 1e9:.2f} GB"
    assert head.startswith(f"owner/little at {COMMIT[:12]}: 4 files to fetch, {total}, into ")
    assert {tuple(line.split()) for line in listed} == {
        (name, f"{size / 1e6:.1f}", "MB") for name, size in sizes.items()
    }
    assert "without --dry-run" in last


def test_before_a_fetch_the_plan_names_the_metrics_weights_and_refuses_another_domain(
    serve, hub_overrides, tmp_path, monkeypatch
):
    monkeypatch.delenv(IMAGE_REWARD.variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serve(PIXART, False):
        plan = dry_run([*hub_overrides, "metrics.names=[psnr,image_reward]"])
        assert "ImageReward.pt, med_config.json (1.8 GB) in" in plan
        assert "loraq fetch weights" in plan
        with pytest.raises(LoraqError, match="mean nothing"):
            dry_run([*hub_overrides, "model.domain=photographs", "data.domain=emoji"])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["data=mjhq", "data.captions=null"], "data.set=mjhq needs data.captions"),
        (["calibration.prompts=1000"], "need 1002 prompts that the run does not generate"),
        (["metrics.names=[psnr,kid]"], "kid need real images"),
    ],
    ids=["prompts", "calibration", "real images"],
)
def test_what_a_run_lacks_is_told_before_its_model_is_downloaded(
    wrong, words, serve, hub_overrides
):
    """It was told after 22 GB."""
    given = [*hub_overrides, *wrong]
    with serve(PIXART, False) as hub:
        for start in (dry_run, run):
            with pytest.raises(LoraqError, match=words):
                start(given)
        if "metrics" not in wrong[0]:
            with pytest.raises(LoraqError, match=words):
                run_until(Stage.QUANTIZED, given, False, print)
        assert not hub.ranges


def test_a_record_holds_the_commit_of_its_branch(serve, hub_overrides, monkeypatch):
    """Keys do not: equal weights are the same model. Offline, a branch is the cached one."""
    with serve(PIXART, False) as hub:
        hub.refs = {"main": OTHER, "v2": COMMIT}
        named = [*hub_overrides, "model.revision=v2"]
        (record,) = run([*named, "method=reference"], progress=False).records
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        keys = make_row(load_rows(named)[0]).keys
        monkeypatch.delenv("HF_HUB_OFFLINE")
        assert record.config["model"]["revision"] == COMMIT
        exact = load_rows([*hub_overrides, f"model.revision={COMMIT}"])[0]
        assert make_row(exact).keys == keys
        assert make_row(load_rows(hub_overrides)[0]).keys == keys
        assert resolve_folder(load_rows(hub_overrides)[0].model).name == OTHER


def test_a_revision_of_a_folder_is_refused(tiny_folder):
    with pytest.raises(LoraqError, match=r"revision=v2 has no effect with path=.*revision=null"):
        little_config(path=str(tiny_folder), revision="v2")
