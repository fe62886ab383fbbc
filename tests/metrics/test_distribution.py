"""Fréchet distance and KID: parity with clean-fid and torchmetrics, known Gaussians, intervals."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from loraq.errors import LoraqError
from loraq.metrics.common import features
from loraq.metrics.common.result import Options
from loraq.metrics.frechet import frechet_distance
from loraq.metrics.kid import kernel_distance, kernel_interval, make_kernels
from loraq.metrics.registry import compute
from tests.metrics.conftest import NAMES, draw, write
from tests.metrics.stand_in import write_little_inception


def gaussian(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) / np.sqrt(d)
    return (generator.normal(size=(n, d)) @ mixing + shift).astype(np.float32)


def clean_fid_distance(a: np.ndarray, b: np.ndarray) -> float:
    from cleanfid.fid import frechet_distance as theirs

    a, b = a.astype(np.float64), b.astype(np.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return theirs(a.mean(0), np.cov(a, rowvar=False), b.mean(0), np.cov(b, rowvar=False))


def needs_sqrtm_disp():
    import scipy

    if tuple(map(int, scipy.__version__.split(".")[:2])) >= (1, 18):
        pytest.skip("clean-fid 0.1.35 calls scipy.linalg.sqrtm(disp=…), gone in SciPy 1.18")


@pytest.mark.parametrize(("n", "m", "d", "tolerance"), [(300, 250, 32, 1e-8), (40, 60, 64, 1e-4)])
def test_frechet_is_clean_fids(n, m, d, tolerance):
    """Equal with full-rank covariances; with fewer images than features as well as its root is."""
    needs_sqrtm_disp()
    a, b = gaussian(n, d, 1), gaussian(m, d, 2, shift=0.3)
    assert frechet_distance(a, b) == pytest.approx(clean_fid_distance(a, b), rel=tolerance)


def test_frechet_of_known_gaussians():
    """A copy scaled by 3 and shifted by 2 differs by Σ 2² + (3 − 1)² tr C, exactly."""
    a = gaussian(200, 16, 3)
    centre = a.mean(0, dtype=np.float64)
    scaled = (a - centre) * 3 + centre + 2.0
    expected = 16 * 4.0 + (2.0**2) * np.trace(np.cov(a, rowvar=False))
    assert frechet_distance(a, scaled) == pytest.approx(expected, rel=1e-5)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    few = gaussian(10, 64, 4)  # rank-deficient: where a matrix root is at its worst
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(few, a[:20, :1].repeat(64, 1)) == pytest.approx(
        frechet_distance(a[:20, :1].repeat(64, 1), few), rel=1e-9
    )


def test_kid_is_clean_fids_and_torchmetrics():
    import torch
    from cleanfid.fid import kernel_distance as theirs
    from torchmetrics.image.kid import poly_mmd

    a, b = gaussian(60, 32, 5), gaussian(60, 32, 6, shift=0.2)
    wide = a.astype(np.float64), b.astype(np.float64)
    assert kernel_distance(make_kernels(a, b)) == pytest.approx(
        theirs(*wide, num_subsets=1), rel=1e-10
    )
    twin = poly_mmd(torch.from_numpy(wide[1]), torch.from_numpy(wide[0]))
    assert kernel_distance(make_kernels(a, b)) == pytest.approx(float(twin), rel=1e-10)


def test_kid_is_unbiased_and_its_interval_covers():
    """The same distribution twice: KID is 0 on average, and 95 % intervals mostly hold 0."""
    values, inside = [], 0
    for trial in range(60):
        kernels = make_kernels(gaussian(40, 8, 100 + trial), gaussian(40, 8, 500 + trial))
        values.append(kernel_distance(kernels))
        lo, hi = kernel_interval(kernels, paired=trial % 2 == 0, samples=300, seed=trial)
        inside += lo <= 0 <= hi
    standard_error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 3 * standard_error
    assert inside >= 50


def test_kid_interval_is_centred_on_the_value():
    """Resampling with copies, counted naively, would shift every estimate upwards."""
    kernels = make_kernels(gaussian(30, 16, 7), gaussian(30, 16, 8, shift=0.5))
    value = kernel_distance(kernels)
    for paired in (True, False):
        lo, hi = kernel_interval(kernels, paired, samples=4000, seed=0)
        assert lo < value < hi
        assert (lo + hi) / 2 == pytest.approx(value, abs=0.2 * (hi - lo))
    assert kernel_interval(kernels, True, 500, 1) == kernel_interval(kernels, True, 500, 1)


@pytest.fixture(scope="module")
def measured(noisy, reference):
    return {name: compute(name, noisy, real=reference) for name in ("frechet", "kid")}


def test_names_follow_the_extractor_and_details_name_it(measured, noisy, reference):
    frechet, kid = measured["frechet"], measured["kid"]
    assert (frechet.name, kid.name) == ("fd_efflite0", "kid_efflite0")
    assert frechet.interval is None and "biased" in frechet.reason
    assert kid.interval is None and "too few images (N < 32)" in kid.reason
    for result in (frechet, kid):
        assert result.details["n"] == len(NAMES) and len(result.details["extractor_sha256"]) == 64
        assert result.details["packages"]["clean-fid"] and result.details["mode"] == "clean"
        assert result.details["real_hash"] == reference.features["efflite0"].hash
    assert set(noisy.features) == {"efflite0"}  # made once, shared


def test_the_distance_to_the_16_bit_images_is_the_distance_to_any_images(noisy, reference):
    found = compute("frechet_reference", noisy, reference)
    assert found.name == "fd_reference_efflite0" and found.interval is None
    assert found.value == compute("frechet", noisy, real=reference).value > 0
    assert found.details["reference_hash"] == reference.features["efflite0"].hash
    assert compute("frechet_reference", reference, reference).value == pytest.approx(0, abs=1e-3)


def test_order_and_batches_do_not_matter(measured, noisy, reference):
    order = np.random.default_rng(1).permutation(len(NAMES))
    shuffled = type(noisy)(tuple(noisy.paths[i] for i in order), tuple(NAMES[i] for i in order))
    for name, whole in measured.items():
        other = compute(name, shuffled, real=reference, batch_size=3)
        assert other.value == pytest.approx(whole.value, rel=1e-4)
        assert compute(name, noisy, real=reference).value == whole.value


def test_distance_grows_with_damage(noisy, reference, tmp_path, measured):
    little = {
        n: np.clip(draw(i).astype(int) + 3, 0, 255).astype(np.uint8) for i, n in enumerate(NAMES)
    }
    near = write(tmp_path, little)
    for name, far in measured.items():
        assert compute(name, near, real=reference).value < far.value
    assert compute("frechet", reference, real=reference).value == pytest.approx(0, abs=1e-6)


def test_resize_is_clean_fids_and_the_networks_own(reference):
    """Our features (resized by clean-fid) and the network's own resize agree."""
    from loraq.metrics.networks import efficientnet_lite0

    options = Options()
    made = features.features_of(reference, "efflite0", options).values
    pixels = next(reference.batches(100))
    assert np.abs(efficientnet_lite0.load_efficientnet_lite0()(pixels).numpy() - made).max() < 1e-4


def test_features_files_and_names(reference, tmp_path, noisy):
    made = features.features_of(reference, "efflite0", Options())
    path = tmp_path / "features.safetensors"
    features.save_features(made, path)
    loaded = features.load_features(path)
    assert loaded.hash == made.hash and loaded.details == made.details
    picked = loaded.of_names([NAMES[3], NAMES[0]])
    assert (picked.values == made.values[[3, 0]]).all()
    from_file = compute("frechet", noisy.subset([1, 2, 3]), real=loaded)
    assert from_file.details["n_real"] == 3
    with pytest.raises(LoraqError, match="these come twice"):
        features.FeatureSet(("a", "a"), made.values[:2], "efflite0")
    with pytest.raises(LoraqError, match="1 of 1 prompts have no image in the set of 10"):
        loaded.of_names(["another"])
    with pytest.raises(LoraqError, match="features of efflite0"):
        compute("frechet", noisy, real=loaded, extractor="inception")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(LoraqError, match="cannot read the features file"):
        features.load_features(path)


def test_inception_only_where_its_weights_are(noisy, reference, monkeypatch, tmp_path):
    monkeypatch.delenv(features.INCEPTION_VARIABLE, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    assert features.choose_extractor("auto") == "efflite0"
    with pytest.raises(LoraqError, match=r"inception-2015-12-05\.pt(.|\n)*LORAQ_INCEPTION_WEIGHTS"):
        compute("frechet", noisy, real=reference, extractor="inception")
    with pytest.raises(LoraqError, match="efflite0"):
        compute("frechet", noisy, real=reference, extractor="eflite0")
    (tmp_path / features.INCEPTION_FILE).write_bytes(b"")
    monkeypatch.setenv(features.INCEPTION_VARIABLE, str(tmp_path))
    assert features.choose_extractor("auto") == "inception"
    assert features.inception_weights() == tmp_path / features.INCEPTION_FILE
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {features.INCEPTION_FILE}\n")
    with pytest.raises(LoraqError, match="does not match SHA256SUMS"):
        features.inception_weights()


def test_inception_path_with_a_stand_in_network(noisy, reference, monkeypatch, tmp_path):
    """The real file is out of reach: a TorchScript network of its interface takes its place."""
    weights = tmp_path / features.INCEPTION_FILE
    monkeypatch.setenv(features.INCEPTION_VARIABLE, str(weights))
    own, real = noisy.subset([0, 1, 2]), reference.subset([0, 1, 2])
    write_little_inception(weights)
    result = compute("frechet", own, real=real, extractor="inception")
    write_little_inception(weights, 2.0)  # read again in the same process
    again = (part.subset([0, 1, 2]) for part in (noisy, reference))
    doubled = compute("frechet", next(again), real=next(again), extractor="inception")
    assert doubled.value == pytest.approx(4 * result.value, rel=1e-6)
    assert result.name == "fid" and result.details["extractor"] == "inception"
    assert result.details["resize"].endswith("299")


def test_features_that_are_not_finite_are_refused_by_name(reference, tmp_path):
    """Also from a file; a singular value of NaN would be a traceback, a mean of NaN no value."""
    from safetensors.numpy import save_file

    made = features.features_of(reference, "efflite0", Options())
    values = made.values.copy()
    values[3, 7] = np.inf
    names = {"names": json.dumps(list(made.names)), "extractor": made.extractor}
    save_file({"features": values}, tmp_path / "features.safetensors", names)
    with pytest.raises(LoraqError, match=rf"1 of 10 images(.|\n)*{NAMES[3]}"):
        features.load_features(tmp_path / "features.safetensors")
