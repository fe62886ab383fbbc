"""Downloads over HTTP from a hub on this machine: whole, interrupted, damaged, refused."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tarfile
import threading
from pathlib import Path

import pytest

from loraq import cli
from loraq.compose import load_rows
from loraq.config import CalibrationConfig, DataConfig
from loraq.data import calibration_prompts, data_prompts, real_image_paths
from loraq.data.fetch import fetch_prompt_set
from loraq.data.manifest import INCOMPLETE, MANIFEST
from loraq.data.sets import SETS
from loraq.errors import LoraqError
from tests.data.hub import COMMIT, serving
from tests.data.layouts import mjhq_files, picture, sdci_files

HUBS = {
    "mjhq": ("playgroundai/MJHQ-30K", mjhq_files(12)),
    "sdci": ("mit-han-lab/svdquant-datasets", sdci_files(9)),
}


def fetch(name: str, folder: Path, url: str, **environment: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, for hub libraries read their address when imported."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGINGFACE"))}
    return subprocess.run(
        [sys.executable, "-m", "loraq.cli", "fetch", name, str(folder), "--quiet"],
        env=kept | {"HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("name", HUBS)
def test_a_set_arrives_unpacked_with_a_manifest(tmp_path, name):
    repository, files = HUBS[name]
    with serving(repository, {**files, "unwanted.bin": b"x" * 100}) as hub:
        done = fetch(name, tmp_path, hub.url)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["commit"] == COMMIT and set(manifest["files"]) == set(files)
    assert manifest["images"] == manifest["prompts"] and manifest["licence"] in done.stdout
    prompts = data_prompts(DataConfig(set=name, captions=str(tmp_path), count=4))
    paths = real_image_paths(name, tmp_path, [prompt.name for prompt in prompts])
    assert [p.read_bytes() for p in paths] == [picture(prompt.name) for prompt in prompts]
    assert not (tmp_path / "unwanted.bin").exists()


def test_a_broken_download_is_told_apart_and_goes_on_where_it_stopped(tmp_path):
    """The archive breaks off again and again; then the rest alone is asked for."""
    repository, files = HUBS["mjhq"][0], mjhq_files(12, padding=25 << 20)
    with serving(repository, files) as hub:
        hub.cut["mjhq30k_imgs.zip"] = itertools.chain([15 << 20], itertools.repeat(0))
        broken = fetch("mjhq", tmp_path, hub.url)
        assert broken.returncode == 2 and "it resumes" in broken.stderr
        with pytest.raises(LoraqError, match="interrupted"):
            data_prompts(DataConfig(set="mjhq", captions=str(tmp_path)))
        assert (tmp_path / INCOMPLETE).is_file() and not (tmp_path / MANIFEST).exists()
        hub.cut.clear()
        hub.ranges.clear()
        done = fetch("mjhq", tmp_path, hub.url)
        assert done.returncode == 0, done.stderr
        asked = [wanted for name, wanted in hub.ranges if name == "mjhq30k_imgs.zip"]
    assert asked == [f"bytes={15 << 20}-"]
    assert not (tmp_path / INCOMPLETE).exists()
    assert len(data_prompts(DataConfig(set="mjhq", captions=str(tmp_path), count=12))) == 12


def test_two_fetches_into_one_folder_share_the_download(tmp_path):
    repository, files = HUBS["sdci"]
    with serving(repository, files) as hub:
        started = [
            threading.Thread(target=lambda: ends.append(fetch("sdci", tmp_path, hub.url)))
            for _ in range(2)
        ]
        ends: list[subprocess.CompletedProcess] = []
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        assert [done.returncode for done in ends] == [0, 0], [done.stderr for done in ends]
        assert sorted(name for name, _ in hub.ranges) == sorted(files)
    assert not (tmp_path / INCOMPLETE).exists()


def test_a_second_fetch_downloads_only_what_is_damaged(tmp_path):
    repository, files = HUBS["sdci"]
    with serving(repository, files) as hub:
        assert fetch("sdci", tmp_path, hub.url).returncode == 0
        hub.ranges.clear()
        assert fetch("sdci", tmp_path, hub.url).returncode == 0
        assert not hub.ranges
        damaged = bytearray(files["sDCI.yaml"])
        damaged[3] ^= 1
        (tmp_path / "sDCI.yaml").write_bytes(bytes(damaged))
        assert fetch("sdci", tmp_path, hub.url).returncode == 0
        assert [name for name, _ in hub.ranges] == ["sDCI.yaml"]
    assert (tmp_path / "sDCI.yaml").read_bytes() == files["sDCI.yaml"]


def test_an_archive_that_has_changed_is_unpacked_again(tmp_path):
    repository, files = HUBS["sdci"]
    with serving(repository, files) as hub:
        assert fetch("sdci", tmp_path, hub.url).returncode == 0
        hub.files |= sdci_files(11)
        assert fetch("sdci", tmp_path, hub.url).returncode == 0
    assert json.loads((tmp_path / MANIFEST).read_text())["images"] == 11
    assert (tmp_path / "sDCI" / "sa_10.jpg").read_bytes() == picture("sa_10")


def test_an_archive_that_leads_outside_is_refused(tmp_path):
    pack = io.BytesIO()
    with tarfile.open(fileobj=pack, mode="w:gz") as archive:
        entry = tarfile.TarInfo("../../escaped.jpg")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    repository, files = HUBS["sdci"]
    folder = tmp_path / "a" / "b"
    with serving(repository, {**files, "sDCI.gz": pack.getvalue()}) as hub:
        done = fetch("sdci", folder, hub.url)
    assert done.returncode == 2 and "cannot be unpacked" in done.stderr
    assert not list(tmp_path.rglob("escaped.jpg"))


def test_without_network_it_says_so_at_once(tmp_path):
    refused = fetch("mjhq", tmp_path / "a", "http://127.0.0.1:9", HF_HUB_OFFLINE="1")
    assert refused.returncode == 2 and "set to offline" in refused.stderr
    dead = fetch("mjhq", tmp_path / "b", "http://127.0.0.1:9")
    assert dead.returncode == 2 and "download of" in dead.stderr
    unknown = fetch("mjqh", tmp_path / "c", "http://127.0.0.1:9")
    assert unknown.returncode == 2 and "Did you mean 'mjhq'" in unknown.stderr
    nowhere = fetch("geneval", tmp_path / "d", "http://127.0.0.1:9")
    assert nowhere.returncode == 2 and "github.com/djghosh13/geneval" in nowhere.stderr


def test_help_names_every_set_that_can_be_fetched(capsys):
    with pytest.raises(SystemExit):
        cli.main(["fetch", "--help"])
    there = {name for name, entry in SETS.items() if entry.hub or entry.url}
    named = re.search(r"\n  SET +(.+)", capsys.readouterr().out).group(1)
    assert set(re.findall(r"\w+", named)) - {"or"} == there | {"weights"}


def test_a_misspelt_set_is_named_with_near_matches(capsys):
    for name, meant in (("weight", "weights"), ("mjqh", "mjhq")):
        with pytest.raises(SystemExit):
            cli.main(["fetch", name])
        assert f"Did you mean '{meant}'" in capsys.readouterr().err


def test_a_file_of_known_checksum_needs_no_hub(tmp_path, monkeypatch):
    """As the SVDQuant reference's calibration captions: from its repository, nothing else taken."""
    text = "".join(
        f"'{number:04}': a picture of {number} things\n" for number in range(40)
    ).encode()
    entry = SETS["qdiff"]
    assert re.search(r"/[0-9a-f]{40}/", entry.url) and len(entry.sha256) == 64
    monkeypatch.setattr("loraq.data.fetch.offline", lambda: False)
    with serving("owner/name", {"qdiff.yaml": text}, "models") as hub:
        url = f"{hub.url}/owner/name/resolve/{COMMIT}/qdiff.yaml"
        local = dataclasses.replace(
            entry, url=url, size=len(text), sha256=hashlib.sha256(text).hexdigest()
        )
        monkeypatch.setitem(SETS, "qdiff", local)
        made = fetch_prompt_set("qdiff", tmp_path / "right", progress=False)
        assert (made["prompts"], made["images"]) == (40, 0)
        monkeypatch.setitem(SETS, "qdiff", dataclasses.replace(local, sha256="0" * 64))
        with pytest.raises(LoraqError, match=r"'qdiff.yaml' does not match the published size"):
            fetch_prompt_set("qdiff", tmp_path / "wrong", progress=False)
        assert not list((tmp_path / "wrong").glob("qdiff.yaml*"))
    names = [f"{number:04}" for number in range(40)]
    random.Random(0).shuffle(names)  # the reference's draw
    settings = CalibrationConfig(
        set="qdiff", captions=str(tmp_path / "right"), prompts=12, measure_prompts=4
    )
    calibration, measuring = calibration_prompts(DataConfig(), settings, load_rows([])[0].model)
    assert [prompt.name for prompt in calibration] == names[:12]
    assert [prompt.name for prompt in measuring] == names[-4:]
