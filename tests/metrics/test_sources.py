"""What computes a metric is in the keys of its values and in the record, and is checked before."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from experiments.parity.clip import write_clip
from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.metrics import alignment, clip_score, image_reward, lpips
from loraq.metrics.common import features
from loraq.metrics.common.result import Options, package_version, packaged_hash
from loraq.metrics.networks import alignment_model, efficientnet_lite0
from loraq.metrics.registry import find_metric, metric_names, metric_sources
from loraq.runner.evaluate import measure_row
from loraq.runner.product_keys import make_row
from loraq.runner.rows import Stage
from loraq.runner.session import Session
from loraq.runner.store import Store
from loraq.utils.assets import ASSETS
from loraq.utils.hashing import cached_hash
from tests.metrics.conftest import draw

MEASURES = {Stage.MEASURED, Stage.RECORD}


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> Callable[..., dict[str, str]]:
    """Metrics → the keys of a row with two prompts and their real images."""
    folder = tmp_path_factory.mktemp("real")
    given = ["method=rtn", "device=cpu", "data.count=2", f"data.real={folder}"]
    config = load_rows(given)[-1]
    for prompt in make_row(config).prompts:
        Image.fromarray(draw(0)).save(folder / f"{prompt.name}.png")

    def of(*names: str) -> dict[str, str]:
        return make_row(replace(config, metrics=replace(config.metrics, names=names))).keys

    return of


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A random CLIP, and files with the names of ImageReward's and Inception's."""
    folder = tmp_path_factory.mktemp("weights")
    write_clip(folder)
    for name in (*image_reward.FILES, features.INCEPTION_FILE):
        (folder / name).write_bytes(b"{ }")
    return folder


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage, key in after.items() if before[stage] != key}


def flipped(path: Path, target: Path) -> Path:
    """A copy of a file in which one bit differs."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("metric", "variable", "files"),
    [
        ("clip_score", clip_score.VARIABLE, (clip_score.WEIGHTS, *clip_score.FILES)),
        ("image_reward", image_reward.VARIABLE, image_reward.FILES),
        ("frechet", features.INCEPTION_VARIABLE, (features.INCEPTION_FILE,)),
        ("kid", features.INCEPTION_VARIABLE, (features.INCEPTION_FILE,)),
    ],
)
def test_values_of_other_weights_have_another_key(
    metric, variable, files, keys, weights, monkeypatch
):
    monkeypatch.setenv(variable, str(weights))
    first = keys(metric)
    for path in (weights / file for file in files):
        state, data = path.stat(), path.read_bytes()
        spaced = data.replace(b" ", b"\t", 1)  # the same JSON
        path.write_bytes(spaced if path.suffix == ".json" else data[:-1] + bytes([data[-1] ^ 1]))
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert path.read_bytes() != data and path.stat().st_size == state.st_size
        assert changed(first, keys(metric)) == MEASURES, path
        path.write_bytes(data)
    assert keys(metric) == first


@pytest.mark.parametrize("metric", metric_names())
def test_an_upgrade_of_a_metrics_package_measures_again(metric, keys, weights, monkeypatch):
    for variable in (clip_score.VARIABLE, image_reward.VARIABLE):
        monkeypatch.setenv(variable, str(weights))
    packages = metric_sources([metric])[metric]["packages"]
    first = keys(metric)
    for package in packages:
        monkeypatch.setattr(
            "loraq.metrics.common.result.package_version",
            lambda name, upgraded=package: (name == upgraded) * "9." + package_version(name),
        )
        found = changed(first, keys(metric))
        images = package in ("torch", "transformers")  # which make them too
        assert found > MEASURES if images else found == MEASURES, package
    monkeypatch.undo()


def test_another_version_of_a_metric_measures_again(keys, monkeypatch):
    first = keys("psnr", "ssim")
    monkeypatch.setattr(find_metric("psnr"), "VERSION", "99")
    assert changed(first, keys("psnr", "ssim")) == MEASURES


def test_a_packaged_file_with_one_flipped_bit_is_refused(tmp_path, monkeypatch):
    shutil.copy(ASSETS / "SHA256SUMS", tmp_path)
    for module, name in ((lpips, "BACKBONE"), (alignment, "HEAD")):
        whole = getattr(module, name)
        monkeypatch.setattr(module, name, flipped(whole, tmp_path / whole.name))
        with pytest.raises(LoraqError, match=rf"{whole.name}' is damaged(.|\n)*git checkout"):
            module.sources(Options())
        with pytest.raises(LoraqError, match="is damaged"):
            metric_sources([module.NAME])
        monkeypatch.setattr(module, name, whole)
    weights = efficientnet_lite0.weights_file()
    damaged = flipped(weights, tmp_path / weights.name)
    monkeypatch.setattr(efficientnet_lite0, "weights_file", lambda: damaged)
    for metric in ("frechet", "kid", "alignment"):
        with pytest.raises(LoraqError, match=r"damaged(.|\n)*efficientnet-lite0.*again"):
            metric_sources([metric])
    monkeypatch.undo()
    folder = alignment_model.model_folder()
    for name in alignment_model.ENCODER:
        shutil.copy(folder / name, tmp_path)
    flipped(folder / "tokenizer.json", tmp_path / "tokenizer.json")
    monkeypatch.setattr(alignment_model, "model_folder", lambda: tmp_path)
    with pytest.raises(LoraqError, match=r"tokenizer\.json' is damaged"):
        metric_sources(["alignment"])


def test_every_packaged_tensor_file_has_its_checksum(tmp_path):
    files = sorted(ASSETS.glob("*.safetensors"))
    assert len(files) == 3
    for path in files:
        assert packaged_hash(path, "") == cached_hash(path)
    with pytest.raises(LoraqError, match=r"is missing(.|\n)*restore it"):
        packaged_hash(tmp_path / "none", "restore it")


def test_damaged_features_of_real_images_are_refused(tmp_path):
    shutil.copy(ASSETS / "SHA256SUMS", tmp_path)
    damaged = flipped(ASSETS / "real_features.safetensors", tmp_path / "real_features.safetensors")
    from loraq.runner.real_images import real_images

    config = load_rows(["method=rtn", f"data.real={damaged}", "device=cpu"])[-1]
    with pytest.raises(LoraqError, match=r"data\.real(.|\n)*does not match SHA256SUMS"):
        real_images(config)


def test_features_of_other_weights_are_not_compared(tmp_path):
    real = features.load_features(ASSETS / "real_features.safetensors")
    other = replace(real, details={"extractor_sha256": "0" * 64})
    with pytest.raises(LoraqError, match=r"other weights(.|\n)*data\.real"):
        metric_sources(["kid"], other)
    same = features.extractor_sources("efflite0")["extractor_sha256"]
    metric_sources(["kid"], replace(real, details={"extractor_sha256": same}))


def test_weights_that_change_during_a_run_stop_it(overrides, tmp_path):
    row = make_row(load_rows(["method=rtn", *overrides])[-1])
    planned = replace(row, keys={**row.keys, Stage.MEASURED: "0" * 16})
    with pytest.raises(LoraqError, match=r"changed since(.|\n)*Run the same command again"):
        measure_row(Session(Store(str(tmp_path / "outputs")), progress=False), planned)


def test_a_hash_is_not_kept_for_other_contents_of_equal_size_and_time(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    state, first = path.stat(), cached_hash(path)
    path.write_bytes(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert cached_hash(path) != first


def test_a_damaged_file_of_inception_is_said_in_words(tmp_path, monkeypatch):
    (tmp_path / features.INCEPTION_FILE).write_bytes(b"no archive")
    monkeypatch.setenv(features.INCEPTION_VARIABLE, str(tmp_path))
    with pytest.raises(LoraqError, match=r"inception-2015-12-05.pt' does not load .*efflite0"):
        features.EXTRACTORS["inception"].load("cpu")
