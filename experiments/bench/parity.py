"""Every metric compared with its reference package, on equal inputs and equal weights.

    python -m experiments.bench.parity --output results/bench/parity.json

Expected time: a few minutes on 2 cores, mostly for ImageReward's two sizes. Outcome: the table in
docs/protocol.md. The Fréchet distance needs SciPy below 1.18, for clean-fid's matrix square root.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from experiments.parity.clip import Restored, write_clip
from experiments.parity.image_reward import pairs
from experiments.parity.twins import golden_scores, torchmetrics_lpips, write_image_reward
from loraq.metrics import clip_score, image_reward
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.frechet import frechet_distance
from loraq.metrics.kid import kernel_distance, make_kernels
from loraq.metrics.registry import compute
from loraq.results import record

SIDE = 128


def image_sets(folder: Path) -> tuple[ImageSet, ImageSet]:
    """24 images of 128 px, with and without noise."""
    found: dict[str, list[Path]] = {"noisy": [], "clean": []}
    for number, picture in enumerate(pairs.pictures()):
        clean = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        noise = np.random.default_rng(number).normal(0, 1 + number, clean.shape)
        noisy = np.clip(clean + noise, 0, 255).round().astype(np.uint8)
        for name, values in (("noisy", noisy), ("clean", clean)):
            found[name].append(folder / f"{name}_{number}.png")
            Image.fromarray(values).save(found[name][-1])
    names, prompts = tuple(map(str, range(pairs.PAIRS))), tuple(pairs.prompts())
    return (
        ImageSet(tuple(found["noisy"]), names, prompts),
        ImageSet(tuple(found["clean"]), names, prompts),
    )


def scaled_to_unit(images: ImageSet) -> torch.Tensor:
    return torch.cat(list(images.batches(pairs.PAIRS))).float() / 255


def compare_psnr(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
    from torchmetrics.image import PeakSignalNoiseRatio

    theirs = []
    for a, b in zip(scaled_to_unit(noisy), scaled_to_unit(clean), strict=True):
        metric = PeakSignalNoiseRatio(data_range=(0.0, 1.0), dim=(1, 2, 3))
        theirs.append(float(metric(a[None], b[None])))
    return compute("psnr", noisy, clean).per_image, theirs


def compare_ssim(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    both = zip(scaled_to_unit(noisy), scaled_to_unit(clean), strict=True)
    theirs = [float(metric(a[None], b[None])) for a, b in both]
    return compute("ssim", noisy, clean).per_image, theirs


def compare_lpips(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
    with torch.no_grad():
        theirs = (
            torchmetrics_lpips()(scaled_to_unit(noisy), scaled_to_unit(clean), normalize=True)
            .flatten()
            .tolist()
        )
    return compute("lpips", noisy, clean).per_image, theirs


def gaussians(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    mixing = draw.normal(size=(d, d)) / np.sqrt(d)
    return draw.normal(size=(n, d)) @ mixing, draw.normal(size=(n, d)) @ mixing + 0.3


def compare_frechet(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
    from cleanfid.fid import frechet_distance as theirs

    a, b = gaussians(500, 128)
    moments = [m for x in (a, b) for m in (x.mean(0), np.cov(x, rowvar=False))]
    return [frechet_distance(a, b)], [theirs(*moments)]


def compare_kid(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
    from cleanfid.fid import kernel_distance as theirs

    a, b = gaussians(500, 128)
    own = kernel_distance(make_kernels(a, b))
    return [own], [theirs(a, b, num_subsets=1, max_subset_size=1000)]


def compare_clip_score(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
    from torchmetrics.functional.multimodal import clip_score as theirs

    with tempfile.TemporaryDirectory() as folder:
        write_clip(Path(folder))
        os.environ[clip_score.VARIABLE] = folder
        ours = compute("clip_score", clean).per_image
        model, processor = clip_score.load_clip(Path(folder), "cpu")
    wanted = []
    for place, prompt in enumerate(clean.prompts or ()):
        picture = torch.from_numpy(clean.read(place)).permute(2, 0, 1)
        with torch.no_grad():
            score = theirs(picture, prompt, lambda: (Restored(model), processor))
        wanted.append(float(score))
    return np.maximum(np.array(ours), 0), wanted


def compare_image_reward(size: str) -> Callable[[ImageSet, ImageSet], tuple[Any, Any]]:
    def both(noisy: ImageSet, clean: ImageSet) -> tuple[Any, Any]:
        golden = golden_scores(size)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_image_reward(folder, golden)
            paths = [folder / f"{number}.png" for number in range(pairs.PAIRS)]
            for path, picture in zip(paths, pairs.pictures(), strict=True):
                picture.save(path)
            os.environ[image_reward.VARIABLE] = name
            images = ImageSet(tuple(paths), clean.names, clean.prompts)
            ours = compute("image_reward", images, batch_size=4).per_image
            image_reward.load_image_reward.cache_clear()
        return ours, golden["scores"]

    return both


PICTURES = f"{pairs.PAIRS} pictures of {SIDE} px, noisy against clean"
FEATURES = "two sets of 500 random features of 128"
PROMPTS = f"{pairs.PAIRS} pictures and prompts, some too long; random weights"
METRICS: dict[str, tuple[str, str, float, bool, Callable[..., tuple[Any, Any]]]] = {
    "psnr": ("torchmetrics", PICTURES, 1e-4, False, compare_psnr),
    "ssim": ("torchmetrics", PICTURES, 1e-6, False, compare_ssim),
    "lpips": ("torchmetrics", f"{PICTURES}, our backbone", 1e-4, False, compare_lpips),
    "frechet": ("clean-fid", FEATURES, 1e-8, True, compare_frechet),
    "kid": ("clean-fid", FEATURES, 1e-8, True, compare_kid),
    "clip_score": ("torchmetrics", f"{PROMPTS}, little CLIP", 1e-4, False, compare_clip_score),
    "image_reward": (
        "image-reward",
        f"{PROMPTS}, ViT-B",
        1e-4,
        False,
        compare_image_reward("base"),
    ),
    "image_reward, as published": (
        "image-reward",
        f"{PROMPTS}, ViT-L",
        1e-4,
        False,
        compare_image_reward("large"),
    ),
}
"""Metric → (reference package, inputs, bound, whether it is relative, (our values, theirs))."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        noisy, clean = image_sets(Path(folder))
        for name, (package, inputs, bound, relative, both) in METRICS.items():
            ours, theirs = (np.asarray(side, dtype=float) for side in both(noisy, clean))
            gap = np.abs(ours - theirs) / (np.abs(theirs) if relative else 1.0)
            version = "1.5" if package == "image-reward" else importlib.metadata.version(package)
            rows.append(
                {
                    "metric": name,
                    "reference": f"{package} {version}",
                    "inputs": inputs,
                    "spread": float(np.std(theirs)),
                    "difference": float(gap.max()),
                    "relative": relative,
                    "bound": bound,
                }
            )
            print(f"{name:28} {rows[-1]['difference']:.2e}  (bound {bound:g})", flush=True)
    if options.output is not None:
        record.save_findings({"rows": rows}, options.output)
    if odd := [row["metric"] for row in rows if not row["difference"] <= row["bound"]]:
        raise SystemExit(f"beyond the bound: {', '.join(odd)}")


if __name__ == "__main__":
    main()
