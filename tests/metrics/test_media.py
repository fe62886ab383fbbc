"""Videos frame by frame, and clips of sound: files without loss, values against other code."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.signal
from PIL import Image
from scipy.io import wavfile

from loraq.errors import LoraqError
from loraq.metrics import log_stft, snr
from loraq.metrics.common.audio_set import AudioSet, read_clip
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.kinds import set_of_folder
from loraq.metrics.common.reading import read_image, read_video, video_shape
from loraq.metrics.common.video_set import VideoSet
from loraq.metrics.registry import check_metrics, compute, measure
from loraq.runner import scores
from loraq.runner.outputs import encode_video, encode_wav
from loraq.runner.store import Store
from tests.metrics.conftest import draw

FRAMES, RATE = 5, 8000
NAMES = ("a", "b", "c")
PAIRED = ("psnr", "ssim", "lpips")


def frames(number: int, noise: float = 0.0) -> np.ndarray:
    """A picture that moves by a pixel a frame: uint8 (5, 64, 64, 3)."""
    moved = [np.roll(draw(number), place, 1) for place in range(FRAMES)]
    made = np.stack(moved) + np.random.default_rng(number).normal(0, noise, (FRAMES, 64, 64, 3))
    return made.round().clip(0, 255).astype(np.uint8)


def tone(number: int, noise: float = 0.0) -> np.ndarray:
    """0.3 s of two tones in stereo: float32 (2, 2400)."""
    time, generator = np.arange(0.3 * RATE) / RATE, np.random.default_rng(number)
    made = np.stack([np.sin(2 * math.pi * pitch * time) for pitch in (440, 660 + 50 * number)])
    return (0.3 * made + generator.normal(0, noise, made.shape)).astype(np.float32)


def video(array: np.ndarray, rate: float = 24) -> bytes:
    return encode_video([Image.fromarray(one) for one in array], rate)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of videos and clips, `own` noisier from name to name, and their references."""
    root = tmp_path_factory.mktemp("media")
    for kind in ("videos", "clips"):
        for side in ("own", "other"):
            folder = root / kind / side
            folder.mkdir(parents=True)
            for number, name in enumerate(NAMES):
                noise = (number + 1) * (side == "own")
                if kind == "videos":
                    (folder / f"{name}.png").write_bytes(video(frames(number, 4 * noise)))
                else:
                    data = encode_wav(tone(number, 0.002 * noise), RATE)
                    (folder / f"{name}.wav").write_bytes(data)
    return root


def pair(folder):
    return [set_of_folder(folder / side, NAMES) for side in ("own", "other")]


@pytest.mark.parametrize("rate", [8, 23.976, 24, 25, 29.97, 60])
def test_a_video_keeps_all_frames_and_its_rate(rate, tmp_path):
    """Equal frames too, which PIL would join to one that is shown longer."""
    moving = np.concatenate([frames(0), frames(0)[-1:], frames(0)[-1:]])
    for number, array in enumerate((moving, np.stack([draw(1)] * 4))):
        path = tmp_path / f"{number}.png"
        path.write_bytes(video(array, rate))
        assert np.array_equal(read_video(path), array)
        shape = video_shape(path)
        assert (shape.frames, shape.height, shape.width) == (len(array), 64, 64)
        assert shape.fps == pytest.approx(rate, rel=1e-6)
    assert video_shape(path).fps == rate or rate != int(rate)
    with pytest.raises(LoraqError, match=r"a video of 4 frames.*metrics=video"):
        read_image(path)


def test_a_clip_keeps_every_bit_and_its_rate(tmp_path):
    path = tmp_path / "a.wav"
    samples = tone(0) * 3  # beyond ±1: float files are not clamped
    path.write_bytes(encode_wav(samples, 44100))
    clip = read_clip(path)
    assert clip.rate == 44100 and np.array_equal(clip.samples_CN, samples)
    path.write_bytes(encode_wav(samples[0], 16000))
    assert np.array_equal(read_clip(path).samples_CN, samples[:1])


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int32])
def test_integer_samples_are_read_in_one_range(dtype, tmp_path):
    path, info = tmp_path / "a.wav", np.iinfo(dtype)
    middle = 128 if dtype == np.uint8 else 0
    wavfile.write(path, RATE, np.array([info.min, middle, info.max], dtype))
    assert read_clip(path).samples_CN == pytest.approx(np.array([[-1, 0, 1]]), abs=0.01)


@pytest.mark.parametrize("damage", [b"", b"RIFF1234", b"nothing of sound" * 8])
def test_a_clip_that_cannot_be_read_is_refused(damage, tmp_path):
    (tmp_path / "a.wav").write_bytes(damage)
    with pytest.raises(LoraqError, match=r"a\.wav"):
        read_clip(tmp_path / "a.wav")


@pytest.mark.parametrize("name", PAIRED)
def test_a_videos_value_is_the_mean_over_its_frames(name, folders, tmp_path):
    own, other = pair(folders / "videos")
    assert isinstance(own, VideoSet)
    result = compute(name, own, other, batch_size=2)
    expected = []
    for title in NAMES:
        sets = []
        for videos in (own, other):
            array = read_video(videos.of_names([title]).paths[0])
            folder = tmp_path / f"{title}_{len(sets)}"
            folder.mkdir()
            for place, one in enumerate(array):
                Image.fromarray(one).save(folder / f"{place}.png")
            sets.append(ImageSet.of_folder(folder, [str(place) for place in range(FRAMES)]))
        expected.append(compute(name, *sets, batch_size=2).value)
    assert result.per_image == pytest.approx(expected, rel=1e-12)
    assert result.value == pytest.approx(np.mean(expected), rel=1e-12)
    alone = compute(name, own.subset([1]), other.subset([1]), batch_size=2)
    assert alone.per_image == result.per_image[1:2]  # bit by bit: no batch holds two videos


def test_an_entry_counts_videos_not_frames_and_parts_have_the_values_of_all(
    folders, tmp_path, monkeypatch
):
    own, other = pair(folders / "videos")
    entry = measure(["psnr"], own, other)["psnr"]
    assert entry["n"] == 3 and len(entry["per_image"]) == 3
    assert own.about() == {"kind": "video", "frames": 5, "fps": 24.0, "seconds": 0.208333}
    monkeypatch.setattr(VideoSet, "PART", 2)
    product = Store(tmp_path), ("scores", "key")
    known = scores.score_images(*product, own, other, ["psnr"], [], {})
    assert len(list(tmp_path.glob("scores/key/*.safetensors"))) == 2
    assert known["psnr"] == compute("psnr", own, other)
    same = compute("psnr", other, other)
    assert same.details["identical"] == 15 and same.value == pytest.approx(same.details["cap"])


def test_videos_of_other_lengths_or_kinds_are_not_compared(folders, tmp_path):
    own, other = pair(folders / "videos")
    for number, name in enumerate(NAMES):
        (tmp_path / f"{name}.png").write_bytes(video(frames(number)[: FRAMES - (name == "b")]))
    with pytest.raises(LoraqError, match=r"b\.png has 4 frames, its reference 5"):
        compute("psnr", set_of_folder(tmp_path, NAMES), other)
    Image.fromarray(draw(0)).save(tmp_path / "b.png")
    with pytest.raises(LoraqError, match="has videos, such as 'a', and images, such as 'b'"):
        set_of_folder(tmp_path, NAMES)
    clips, _ = pair(folders / "clips")
    with pytest.raises(LoraqError, match=r"holds videos.*clips"):
        compute("psnr", own, clips)


@pytest.mark.parametrize(
    ("names", "kind", "words"),
    [
        (["psnr", "frechet", "kid"], "video", r"frechet, kid.*videos.*metrics=video.*\[psnr\]"),
        (["clip_score"], "video", r"clip_score computes values of images.*metrics=video"),
        (["psnr", "snr"], "audio", r"psnr computes.*clips.*metrics=audio.*\[snr\]"),
        (["log_stft"], "image", r"values of clips, and these are images.*metrics=paired"),
    ],
)
def test_metrics_of_another_kind_are_refused_with_those_of_this_one(names, kind, words):
    with pytest.raises(LoraqError, match=words):
        check_metrics(names, 4, 64, kind=kind)


def scipy_log_magnitudes(samples: np.ndarray, points: int, window: int, hop: int) -> np.ndarray:
    """By scipy's own transform, with the padding written out."""
    before = (points - window) // 2
    hann = np.zeros(points)
    hann[before : before + window] = scipy.signal.get_window("hann", window)
    padded = np.pad(samples.astype(np.float64), points // 2, mode="reflect")
    _, _, found = scipy.signal.stft(
        padded, window=hann, nperseg=points, noverlap=points - hop, boundary=None, padded=False
    )
    return np.log(np.maximum(np.abs(found) * hann.sum(), 1e-5))  # scipy divides by the window's sum


def test_the_distance_of_spectra_is_scipys(folders):
    own, other = pair(folders / "clips")
    assert isinstance(own, AudioSet)
    result = compute("log_stft", own, other)
    expected = []
    for number in range(3):
        clips = tone(number, 0.002 * (number + 1)), tone(number)
        distances = []
        for sizes in log_stft.RESOLUTIONS:
            logs = [np.stack([scipy_log_magnitudes(c, *sizes) for c in clip]) for clip in clips]
            distances.append(np.abs(logs[0] - logs[1]).mean())
        expected.append(np.mean(distances))
    assert result.per_image == pytest.approx(expected, rel=1e-9)
    assert sorted(result.per_image) == result.per_image and result.per_image[0] > 0.1
    assert compute("log_stft", other, other).value == 0
    assert own.about() == {"kind": "audio", "rate": RATE, "channels": 2, "seconds": 0.3}


def test_the_spectral_distance_of_levels_is_their_logarithm(tmp_path):
    """Twice the amplitude is ln 2 everywhere; silence is as far as the floor."""
    import torch

    noise = torch.randn(1, 4000, dtype=torch.float64, generator=torch.manual_seed(0))
    assert log_stft.log_stft_distance(2 * noise, noise) == pytest.approx(math.log(2), rel=1e-9)
    silence = log_stft.log_stft_distance(0 * noise, noise)
    assert 10 < silence < math.inf


def test_the_ratio_is_its_formula_and_has_a_cap(folders):
    own, other = pair(folders / "clips")
    result = compute("snr", own, other)
    for number, value in enumerate(result.per_image):
        noisy, clean = tone(number, 0.002 * (number + 1)), tone(number)
        noise = noisy.astype(np.float64) - clean
        power = np.mean(clean.astype(np.float64) ** 2) / np.mean(noise**2)
        assert value == pytest.approx(10 * np.log10(power), rel=1e-12)
    same = compute("snr", other, other)
    assert same.value == snr.CAP and same.details["identical"] == 3


def test_clips_that_cannot_be_compared_are_refused(folders, tmp_path):
    own, _ = pair(folders / "clips")

    def against(samples, rate=RATE):
        for name in NAMES:
            (tmp_path / f"{name}.wav").write_bytes(encode_wav(samples, rate))
        return set_of_folder(tmp_path, NAMES)

    with pytest.raises(LoraqError, match=r"a\.wav is Clip\(0\.30 s.*0\.15 s.*16000 Hz"):
        compute("snr", own, against(tone(0), 16000))
    with pytest.raises(LoraqError, match="same rate and length"):
        compute("snr", own, against(tone(0)[:, :-1]))
    silent = against(np.zeros((2, 2400), np.float32))
    assert silent.one_colour() == list(NAMES) and own.one_colour() == []
    with pytest.raises(LoraqError, match="the reference of 'a' is silent"):
        compute("snr", own, silent)
    short = against(tone(0)[:, :1000])
    with pytest.raises(LoraqError, match="1000 samples; this metric needs 1025"):
        compute("log_stft", short, short)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_clip_with_nan_is_refused_not_scored_as_identical(value, folders, tmp_path):
    """NaN is not below the cap of SNR, so that such a clip had the best value of all."""
    for name in NAMES:
        samples = tone(0)
        samples[1, 7] = value if name == "b" else 0
        (tmp_path / f"{name}.wav").write_bytes(encode_wav(samples, RATE))
    reference = set_of_folder(folders / "clips" / "other", NAMES)
    for metric in ("snr", "log_stft"):
        with pytest.raises(LoraqError, match=r"b\.wav: 1 of 4800 samples are NaN or infinite"):
            compute(metric, set_of_folder(tmp_path, NAMES), reference)
