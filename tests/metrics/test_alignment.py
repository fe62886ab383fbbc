"""The alignment proxy: per image, independent of batches and order, and about the prompt."""

from __future__ import annotations

import numpy as np
import pytest

from loraq.metrics import alignment
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.registry import compute

pytestmark = pytest.mark.skipif(not alignment.HEAD.is_file(), reason="its head is not trained yet")


def test_per_image_and_independent_of_batches_and_order(noisy):
    whole = compute("alignment", noisy)
    assert len(whole.per_image) == len(noisy) and max(map(abs, whole.per_image)) <= 1
    assert whole.value == pytest.approx(np.mean(whole.per_image))
    order = np.random.default_rng(0).permutation(len(noisy))
    other = ImageSet(
        tuple(noisy.paths[i] for i in order),
        tuple(noisy.names[i] for i in order),
        tuple(noisy.prompts[i] for i in order),
    )
    shuffled = compute("alignment", other, batch_size=3)
    assert shuffled.per_image == pytest.approx([whole.per_image[i] for i in order], abs=1e-5)
    assert whole.details["head_sha256"] and whole.details["extractor"] == "efflite0"


def test_real_images_fit_their_own_captions_better_than_others():
    """On the committed features of the test captions' real images, held-out ones included."""
    import json

    import torch

    from loraq.metrics.common.features import load_features
    from loraq.metrics.networks import alignment_model

    assets = alignment.HEAD.parent
    features = load_features(assets / "real_features.safetensors")
    captions = json.loads((assets / "captions.json").read_text(encoding="utf-8"))["test"]
    assert [entry["name"] for entry in captions] == list(features.names)
    model = alignment_model.load_alignment_model(alignment.HEAD)
    held_out = [i for i, entry in enumerate(captions) if not entry["seen"]][:64]
    images = model.image_features(torch.from_numpy(features.values[held_out]))
    texts = model.text_features([captions[i]["prompt"] for i in held_out])
    cosines = images @ texts.T
    better = cosines.diagonal()[:, None] > cosines
    right = better[~torch.eye(len(held_out), dtype=torch.bool)].float().mean()
    assert right > 0.8
