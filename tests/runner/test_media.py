"""Videos and sound from generation to the page, on little pipelines of the real classes."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from loraq.compose import load_rows
from loraq.errors import LoraqError
from loraq.metrics.common.audio_set import read_clip
from loraq.metrics.common.reading import read_video
from loraq.results.report.page import write_report
from loraq.runner.experiment import run
from loraq.runner.score import score_images
from tests.damage import flip_bit
from tests.pipelines import little_folder, settings
from tests.settings import small_run

SIZES = ("height", "width", "max_sequence_length")
SUFFIX = {"wan": ".png", "stable_audio": ".wav"}


def overrides(name: str, captions: Path, output: Path, *more: str) -> list[str]:
    family = settings(name)
    shared = small_run(little_folder(name), captions, output)
    kept = [o for o in shared if not o.startswith(("model.", "metrics.names", "data.count"))]
    starts = {key: "model." if key in SIZES else "+model.call." for key in family.CALL}
    call = [f"{starts[key]}{key}={value}" for key, value in family.CALL.items()]
    own = [f"model.path={little_folder(name)}", f"model.steps={family.STEPS}", "data.count=2"]
    return ["model=hub", "model.dtype=float32", "method=rtn", *own, *call, *kept, *more]


@pytest.fixture(scope="module", params=["wan", "stable_audio"])
def ran(request, captions, tmp_path_factory):
    asked = overrides(request.param, captions, tmp_path_factory.mktemp("media"))
    return request.param, asked, run(asked, progress=False)


def folders(outcome) -> tuple[Path, Path]:
    """Of the 16-bit outputs and of the quantised ones."""
    root = outcome.folder.parents[1] / "images"
    made = {folder.name: folder for folder in root.iterdir()}
    listed = re.findall(r'"images": "(\w+)"', (outcome.folder / "rows.json").read_text())
    return made[listed[0]], made[listed[1]]


def test_a_record_says_what_was_made_and_measures_it(ran):
    name, _, outcome = ran
    reference, quantised = outcome.records
    table = (outcome.folder / "main.md").read_text()
    if name == "wan":
        about = {"kind": "video", "frames": 5, "fps": 16.0, "seconds": 0.3125}
        assert list(quantised.metrics) == ["psnr", "lpips", "ssim"]
        assert "N counts videos of 5 frames" in table and "too few videos" in table
    else:
        about = {"kind": "audio", "rate": 8000, "channels": 2, "seconds": 0.3}
        assert list(quantised.metrics) == ["log_stft", "snr"]
        assert "clips of sound of 0.3 s" in table and "too few clips" in table
    assert "images" not in table.replace("image_", "")
    assert about.items() <= reference.images.items() and about.items() <= quantised.images.items()
    for entry in quantised.metrics.values():
        assert entry["n"] == 2 and len(set(entry["per_image"])) == 2


def test_files_are_what_the_pipeline_made(ran):
    """Of one prompt, from a call of the pipeline itself."""
    import torch

    from loraq.data import seed_of_name
    from tests.pipelines import build

    name, _, outcome = ran
    path = folders(outcome)[0] / f"t_0{SUFFIX[name]}"
    family = settings(name)
    made = build(name)(
        prompt=["a red cat"],
        num_inference_steps=family.STEPS,
        generator=[torch.Generator("cpu").manual_seed(seed_of_name("t_0", 0))],
        output_type="np",
        **family.CALL,
    )
    if name == "wan":
        assert np.array_equal(read_video(path), (made.frames[0] * 255).round().astype(np.uint8))
    else:
        assert np.array_equal(read_clip(path).samples_CN, made.audios[0])


def test_score_of_the_folders_gives_the_records_values(ran, captions):
    name, asked, outcome = ran
    against, own = folders(outcome)
    data = [o for o in asked if o.startswith(("data.", "device", "output"))]
    metrics = "metrics=video" if name == "wan" else "metrics=audio"
    scores = score_images(own, [metrics, *data], against, progress=False)
    for metric, entry in outcome.records[1].metrics.items():
        assert scores.metrics[metric]["per_image"] == entry["per_image"], metric
    unit = "videos" if name == "wan" else "clips"
    assert scores.text().startswith(f"2 {unit} in") and "images (" not in scores.text()
    with pytest.raises(LoraqError, match=rf"these are {unit}. Set {metrics}"):
        score_images(own, data, against, progress=False)


def test_a_page_shows_the_outputs_and_plays_them(ran):
    name, _, outcome = ran
    page = write_report(outcome.folder, outcome.folder / "report.html").read_text()
    if name == "wan":
        assert ">Videos</h2>" in page and page.count('class="moving"') == 4
        assert "<audio" not in page and "media-src" not in page
        assert "2 of 2 videos, 5 frames each" in page
    else:
        assert ">Clips</h2>" in page and page.count("<audio controls") == 4
        assert "media-src data:" in page and "spectrogram" in page


def test_a_damaged_output_is_made_again_with_the_same_bytes(ran):
    name, asked, outcome = ran
    path = folders(outcome)[1] / f"t_1{SUFFIX[name]}"
    wanted = path.read_bytes()
    flip_bit(path, len(wanted) // 2)
    run(asked, progress=False)
    assert path.read_bytes() == wanted


@pytest.mark.parametrize("name", SUFFIX)
def test_metrics_of_another_kind_are_refused_before_anything_runs(name, captions, tmp_path):
    asked = overrides(name, captions, tmp_path, "metrics=default")
    with pytest.raises(LoraqError, match=r"these are (videos|clips)\. Set metrics="):
        run(asked, progress=False)
    assert not list(tmp_path.glob("images/*"))
    assert load_rows(asked[:-1])[0].metrics.names[0] in ("psnr", "log_stft")
