"""Published weights, downloaded from a stand-in of the hub and of NVIDIA's host, then found."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loraq import cli
from loraq.errors import LoraqError
from loraq.metrics.common.fetch import fetch_weights
from loraq.metrics.common.published import CLIP, IMAGE_REWARD, INCEPTION, PUBLISHED, needed_weights
from loraq.metrics.common.result import Options
from loraq.metrics.common.weights import Weights
from loraq.metrics.registry import check_metrics, compute, find_metric, metric_names, metric_sources
from loraq.runner.estimate import dry_run
from loraq.runner.experiment import run
from loraq.runner.score import score_images
from loraq.utils import download
from loraq.utils.assets import CHECKOUT
from loraq.utils.console import size_text
from loraq.utils.download import CHUNK
from tests.data.hub import Hub
from tests.metrics.conftest import draw, write
from tests.metrics.stand_in import Files, little_files, serving_weights, table_of
from tests.metrics.with_table import use_table

METRICS = ("frechet", "clip_score", "image_reward")
LARGE = "ImageReward.pt"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Files:
    return little_files(tmp_path_factory.mktemp("little"))


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """The server, an empty cache, and the table of the little files."""
    for weights in PUBLISHED:
        monkeypatch.delenv(weights.variable, raising=False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with serving_weights(files) as hub, use_table(table_of(files, hub.url)):
        template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def fetch(*wanted: Weights) -> str:
    lines: list[str] = []
    fetch_weights(wanted or PUBLISHED, lines.append, progress=False)
    return "\n".join(lines)


def command(hub: Hub, files: Files, folder: Path, *given: str, **more: str) -> subprocess.Popen:
    """`loraq fetch weights` in a process of its own, as a user of another hub would run it."""
    table = folder / "table.json"
    table.write_text(json.dumps(table_of(files, hub.url)))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HUGGINGFACE")}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.metrics.with_table", str(table), "fetch", "weights", *given],
        env=kept | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def asked(hub: Hub) -> list[str]:
    return sorted(name.rsplit("/", 1)[-1] for name, _ in hub.ranges)


def all_names(files: Files) -> list[str]:
    return sorted(name for contents in files.values() for name in contents)


def test_two_commands_at_once_bring_every_file_once_with_the_token_for_the_hub_alone(
    hub, files, tmp_path
):
    running = [command(hub, files, tmp_path, HF_TOKEN="hf_secret") for _ in range(2)]
    ended = [process.communicate(timeout=120) for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert asked(hub) == all_names(files)
    for weights in PUBLISHED:
        found = {p.name: p.read_bytes() for p in weights.folder.iterdir() if p.name != ".lock"}
        assert found == files[weights.name]
        size = size_text(sum(map(len, found.values())))
        assert re.search(rf"{weights.name} +{size} .*{re.escape(weights.source)}", ended[0][0])
    secret = {name for name, token in hub.tokens.items() if token}
    assert secret and not any(name.startswith("nvidia/") for name in secret)


def test_metrics_find_them_without_variables_and_offline(
    hub, files, noisy, reference, tmp_path, monkeypatch
):
    fetch()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.ranges.clear()
    own, real = noisy.subset([0, 1, 2]), reference.subset([0, 1, 2])
    check_metrics(METRICS, 3, 64, real, extractor="inception")
    found = {name: compute(name, own, real=real, extractor="inception") for name in METRICS}
    assert not hub.ranges and found["frechet"].name == "fid"
    table = {file.name: file.sha256 for weights in PUBLISHED for file in weights.files}
    for name, file in (("clip_score", "model.safetensors"), ("image_reward", LARGE)):
        assert found[name].details["weights_sha256"] == table[file]
    assert found["frechet"].details["extractor_sha256"] == table[INCEPTION.files[0].name]
    for weights in PUBLISHED:  # a variable names the same files: the same values, the same keys
        elsewhere = tmp_path / weights.name
        weights.folder.rename(elsewhere)
        monkeypatch.setenv(weights.variable, str(elsewhere))
    for name in METRICS:
        again = compute(name, noisy.subset([0, 1, 2]), real=real, extractor="inception")
        assert (again.value, again.details) == (found[name].value, found[name].details)


def test_a_cut_download_goes_on_where_it_stopped(hub, files, monkeypatch):
    whole = files[IMAGE_REWARD.name][LARGE]
    path = next(name for name in hub.files if name.endswith(LARGE))
    hub.cut[path] = itertools.chain([CHUNK] * 4, itertools.repeat(0))
    monkeypatch.setattr(download, "ATTEMPTS", 2)  # with nothing new; four with a megabyte go on
    with pytest.raises(LoraqError, match=r"download of .*ImageReward(.|\n)*it resumes"):
        fetch(IMAGE_REWARD)
    assert not (IMAGE_REWARD.folder / LARGE).exists()
    hub.cut.clear()
    hub.ranges.clear()
    fetch(IMAGE_REWARD)
    assert hub.ranges[0] == (path, f"bytes={CHUNK * 4}-")
    assert (IMAGE_REWARD.folder / LARGE).read_bytes() == whole
    assert not (CLIP.folder.exists() or list(IMAGE_REWARD.folder.glob("*.part")))


def test_wrong_contents_are_refused_and_leave_nothing_that_looks_whole(hub, files):
    path = next(name for name in hub.files if name.endswith("model.safetensors"))
    whole = hub.files[path]
    hub.files[path] = whole[:-1] + bytes([whole[-1] ^ 1])
    with pytest.raises(LoraqError, match=r"model\.safetensors' does not match(.|\n)*was deleted"):
        fetch(CLIP)
    assert not list(CLIP.folder.glob("model.safetensors*"))
    with pytest.raises(LoraqError, match=r"needs model\.safetensors(.|\n)*--only clip_score"):
        CLIP.locate("metric clip_score")
    hub.files[path] = whole
    fetch(CLIP)
    CLIP.locate("metric clip_score")


def test_a_file_that_was_changed_later_is_refused_at_every_load_and_replaced(hub, noisy):
    fetch(IMAGE_REWARD)
    settings = IMAGE_REWARD.folder / "med_config.json"
    settings.write_bytes(settings.read_bytes().replace(b" ", b"\t", 1))
    for load in (
        lambda: metric_sources(["image_reward"]),
        lambda: compute("image_reward", noisy.subset([0])),
    ):
        with pytest.raises(LoraqError, match=r"med_config\.json' is not the published(.|\n)*fetch"):
            load()
    hub.ranges.clear()
    assert "to download" in fetch(IMAGE_REWARD)
    assert asked(hub) == ["med_config.json"]
    assert "complete and verified" in fetch(IMAGE_REWARD)


def test_a_half_filled_cache_is_named_and_only_the_rest_is_brought(hub, monkeypatch):
    fetch(IMAGE_REWARD)
    (IMAGE_REWARD.folder / LARGE).unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for check in (lambda: check_metrics(["image_reward"], 2, 64), lambda: fetch(IMAGE_REWARD)):
        with pytest.raises(LoraqError, match="HF_HUB_OFFLINE"):
            check()
    with pytest.raises(LoraqError, match=r"needs ImageReward\.pt \(.*kB|MB\)"):
        IMAGE_REWARD.locate("metric image_reward")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.ranges.clear()
    fetch(IMAGE_REWARD)
    assert asked(hub) == [LARGE]


def test_the_plan_says_what_is_missing_and_the_run_brings_it(
    hub, files, overrides, tmp_path, monkeypatch
):
    write(tmp_path / "real", {f"t_{number}": draw(number) for number in range(4)})
    own = [one for one in overrides if not one.startswith(("metrics.names", "data.real"))]
    given = ["method=rtn", *own, "metrics=published", f"data.real={tmp_path / 'real'}"]
    planned = dry_run(given)
    assert f"ImageReward.pt, med_config.json ({size_text(IMAGE_REWARD.size)}) in" in planned
    assert planned.count("'" + str(tmp_path / "home" / "loraq")) == len(PUBLISHED)
    assert "loraq fetch weights" in planned and not hub.ranges
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for start in (dry_run, run):
        with pytest.raises(LoraqError, match=r"offline(.|\n)*loraq fetch weights --only"):
            start(given)
    assert not hub.ranges
    monkeypatch.delenv("HF_HUB_OFFLINE")
    done = run(given, progress=False)
    assert asked(hub) == all_names(files)
    measured = re.findall(r"measured +(\w+)", planned)
    assert measured == re.findall(r"measured +(\w+)  cached", dry_run(given))
    found = done.records[-1].metrics
    assert set(found) >= {"psnr", "lpips", "ssim", "fid", "kid", "clip_score", "image_reward"}
    assert not any("efflite0" in name or name == "alignment" for name in found)
    assert found["image_reward"]["details"]["weights_sha256"] == IMAGE_REWARD.files[0].sha256


def test_scoring_a_folder_brings_them_too(hub, captions, tmp_path):
    write(tmp_path / "images", {f"t_{number}": draw(number) for number in range(2)})
    given = [f"data.captions={captions}", "data.count=2", "metrics.names=[image_reward]"]
    scores = score_images(tmp_path / "images", given, None, progress=False)
    assert scores.metrics["image_reward"]["n"] == 2
    assert asked(hub) == [LARGE, "med_config.json"]


@pytest.mark.parametrize("metric", metric_names())
def test_a_metric_is_listed_with_the_weights_that_it_reads(metric, monkeypatch, tmp_path):
    for weights in PUBLISHED:
        monkeypatch.delenv(weights.variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    read: list[Weights] = []
    hashes = Weights.hashes
    monkeypatch.setattr(Weights, "hashes", lambda own, what: read.append(own) or hashes(own, what))
    find_metric(metric).sources(Options(extractor="inception"))
    assert read == needed_weights([metric], "inception")


def test_help_and_pages_state_the_sizes_of_the_table(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fetch", "--help"])
    shown = capsys.readouterr().out
    sizes = {weights.name: size_text(weights.size) for weights in PUBLISHED}
    total = size_text(sum(weights.size for weights in PUBLISHED))
    pages = ("README.md", "docs/protocol.md", "conf/metrics/published.yaml")
    for text in (shown, *((CHECKOUT / page).read_text(encoding="utf-8") for page in pages)):
        assert total in text
    table = (CHECKOUT / "docs/protocol.md").read_text(encoding="utf-8")
    for weights in PUBLISHED:
        assert f"{sizes[weights.name]} | `{weights.variable}=" in table
    assert (
        f"fid,image_reward  {sizes[INCEPTION.name]} and {sizes[IMAGE_REWARD.name]}; "
        f"clip_score: {sizes[CLIP.name]}" in shown
    )
    for file in (file for weights in PUBLISHED for file in weights.files):
        assert re.fullmatch("[0-9a-f]{64}", file.sha256) and file.size > 0
