"""Videos and clips of sound in grids, tables, pages and W&B: what is shown is said."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from scipy.io import wavfile

from loraq.metrics.common.audio_set import Clip
from loraq.metrics.common.kinds import set_of_folder
from loraq.results.plots.grid import image_grid
from loraq.results.plots.still import FRAMES, drawn_clip, still, strip, what_is_shown
from loraq.results.record import Record, from_json, to_json
from loraq.results.report.gallery import make_gallery
from loraq.results.tables.brief import brief_table
from loraq.results.tables.tables import main_table
from loraq.results.tracking.tracker import _shown
from loraq.runner.outputs import encode_video, encode_wav
from loraq.runner.store import Store
from loraq.utils.kinds import SUFFIXES

NAMES = ("a", "b")
RATE = 8000


def record(kind: str, folder: Path, row: str) -> Record:
    names = ("psnr", "lpips") if kind == "video" else ("snr", "log_stft")
    entry: dict[str, Any] = {"value": 20.5, "lo": None, "hi": None, "n": 2, "reason": ""}
    entry |= {"per_image": [20.0, 21.0], "details": {"identical": 1, "cap": 89.0}}
    directions = ("higher", "lower")
    found = set_of_folder(folder, NAMES)
    return Record(
        key=row,
        experiment="demo",
        row=row,
        label=row,
        config={"method": row, "model": {"name": "little"}, "data": {}},
        model_hash="ab",
        budget={"bits_per_weight": 16.0},
        images={"hash": found.hash, "names": list(NAMES), "seen": [], **found.about()},
        metrics={
            name: entry | {"direction": direction}
            for name, direction in zip(names, directions, strict=True)
        },
    )


@pytest.fixture(scope="module", params=["video", "audio"])
def rows(request, tmp_path_factory) -> list[tuple[Record, Path]]:
    """Two rows of two videos of nine frames, or of two clips of 0.3 s."""
    generator, made = np.random.default_rng(0), []
    store, suffix = Store(tmp_path_factory.mktemp("media")), SUFFIXES[request.param]
    for row in ("reference", "rtn"):
        info = {"kind": "images", "units": len(NAMES)}
        with store.write("images", row, info, [f"{name}{suffix}" for name in NAMES]) as folder:
            for name in NAMES:
                if request.param == "video":
                    array = generator.integers(0, 256, (9, 16, 24, 3), np.uint8)
                    data = encode_video([Image.fromarray(one) for one in array], 8)
                else:
                    data = encode_wav(generator.normal(0, 0.2, (2, 2400)), RATE)
                (folder / f"{name}{suffix}").write_bytes(data)
        folder = store.path("images", row)
        made.append((record(request.param, folder, row), folder))
    return made


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix in (".png", ".wav"))


def test_a_strip_has_the_first_and_the_last_frame():
    video = np.stack([np.full((8, 10, 3), 10 * place, np.uint8) for place in range(9)])
    shown = strip(video)
    assert shown.shape == (8, 5 * 10 + 4 * 2, 3)
    assert [shown[0, 12 * place, 0] for place in range(5)] == [0, 20, 40, 60, 80]
    assert strip(video[:1]).shape == (8, 10, 3) and strip(video[:3]).shape == (8, 34, 3)


def test_a_drawn_clip_shows_amplitude_and_pitch():
    time = np.arange(RATE) / RATE
    tone = 0.5 * np.sin(2 * np.pi * 1000 * time)
    picture = drawn_clip(Clip(np.stack([tone, tone]).astype(np.float32), RATE))
    wave, spectrum = picture[:96], picture[96:].sum(-1, dtype=int)
    inked = np.flatnonzero((wave != 255).any((1, 2)))
    assert inked.min() == pytest.approx(24, abs=1) and inked.max() == pytest.approx(71, abs=1)
    brightest = spectrum[:, 50:-50].argmax(0)  # 1000 of 4000 Hz: a quarter from below
    assert brightest == pytest.approx(np.full(len(brightest), 0.75 * 128), abs=2)
    quiet = drawn_clip(Clip(np.zeros((1, 100), np.float32), RATE))
    assert quiet.shape == picture.shape and (quiet[96:] == quiet[96, 0]).all()


def test_grids_show_every_output_and_say_what(rows, tmp_path):
    kind, folders = rows[0][0].images["kind"], [folder for _, folder in rows]
    words = what_is_shown(2, 32, files(folders[0])[0])
    if kind == "video":
        assert words == "2 of 32 videos, 5 of 9 frames each"
    else:
        assert re.fullmatch(r"2 of 32 clips: waveform .* spectrogram \(0 to 4000 Hz\)", words)
    columns = [files(folder) for folder in folders]
    bare = image_grid(["16-bit", "RTN"], columns, ["x", "y"], tmp_path / "bare.png")
    said = image_grid(["16-bit", "RTN"], columns, ["x", "y"], tmp_path / "said.png", caption=words)
    picture = still(columns[1][0])
    sheet = np.asarray(Image.open(said))
    whole = picture.size[0] * -(-96 // picture.size[0])  # enlarged by an integer factor
    height = round(picture.size[1] * whole / picture.size[0])
    sized = np.asarray(picture.resize((whole, height), Image.Resampling.NEAREST))
    second = sheet[:, 176 + whole :][:, :whole]
    places = range(len(second) - height)
    assert any(np.array_equal(second[top : top + height], sized) for top in places)
    assert (sheet[:30, :160] != 255).any() and Image.open(bare).size[0] == sheet.shape[1]


def test_tables_count_videos_and_clips(rows):
    records = [record for record, _ in rows]
    kind = records[0].images["kind"]
    assert from_json(to_json(records[0])) == records[0]
    table = main_table(records)
    notes = "\n".join(table.notes)
    if kind == "video":
        assert "N counts videos of 9 frames at 8 frames per second; values are means" in notes
        assert "reference: 1 of 18 frames are identical" in notes
    else:
        assert "clips of sound of 0.3 s, 8000 samples per second, channels: 2" in notes
        assert "1 of 2 clips are identical" in notes and "infinite SNR counts as" in notes
    columns = brief_table(records, "reference").columns
    titles = ["PSNR ↑", "LPIPS ↓"] if kind == "video" else ["SNR ↑", "log-STFT distance ↓"]
    assert columns == ["row", "bits/weight", *titles, *(f"Δ {title}" for title in titles)]


def test_a_page_plays_what_it_shows(rows):
    gallery = make_gallery(rows)
    kind, entries = rows[0][0].images["kind"], gallery.prompts[0][2]
    assert entries[1].note == "20.0 dB"
    playing = entries[1].moving if kind == "video" else entries[1].sound
    header, _, data = playing.partition(",")
    stream = io.BytesIO(base64.b64decode(data))
    if kind == "video":
        assert gallery.shows == "2 of 2 videos, 5 of 9 frames each"
        assert header == "data:image/webp;base64" and entries[1].difference
        with Image.open(stream) as moving:
            assert len(list(ImageSequence.Iterator(moving))) == 9
    else:
        assert gallery.shows.endswith("The page plays the first 5 s in 16 bits")
        assert header == "data:audio/wav;base64" and entries[1].difference is None
        rate, samples = wavfile.read(stream)
        assert rate == RATE and samples.shape == (2400, 2) and samples.dtype == np.int16


def test_runs_of_wandb_get_strips_and_sound(rows):
    import wandb

    path = files(rows[0][1])[0]
    made = _shown(wandb, path)
    if rows[0][0].images["kind"] == "audio":
        assert isinstance(made, wandb.Audio)
    else:
        assert isinstance(made, wandb.Image) and made.image.size == still(path).size
    assert FRAMES == 5
