"""ImageReward on current transformers: the published package's scores, and what is refused."""

from __future__ import annotations

import hashlib
import json
import pickle

import numpy as np
import pytest
import torch

from experiments.parity.image_reward import pairs
from experiments.parity.twins import golden_scores, write_image_reward
from loraq.errors import LoraqError
from loraq.metrics import image_reward
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.result import Options
from loraq.metrics.networks import image_reward_model as reward
from loraq.metrics.registry import compute
from tests.metrics.stand_in import write_little_image_reward

GOLDEN = golden_scores("base")
BOUND = 1e-4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("image_reward")
    write_image_reward(folder, GOLDEN)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, picture in enumerate(pairs.pictures()):
        paths.append(folder / f"{number}.png")
        picture.save(paths[-1])
    names = tuple(path.stem for path in paths)
    return ImageSet(tuple(paths), names, prompts=tuple(pairs.prompts()))


@pytest.fixture
def given(folder, monkeypatch):
    monkeypatch.setenv(image_reward.VARIABLE, str(folder))
    return folder


def test_every_score_is_the_published_packages(given, images):
    """12 pairs, a third of them longer than the 35 tokens that are read; in batches of any size."""
    every_second = range(0, pairs.PAIRS, 2)
    found = compute("image_reward", images.subset([*every_second]), batch_size=5)
    wanted = np.array(GOLDEN["scores"])[every_second]
    assert np.std(wanted) > 0.1  # so that the bound means something
    assert np.abs(np.array(found.per_image) - wanted).max() < BOUND
    values = compute("image_reward", images.subset([20, 3]), batch_size=1).per_image
    assert np.abs(np.array(values) - np.array(GOLDEN["scores"])[[20, 3]]).max() < BOUND
    assert found.details["weights_sha256"] and found.details["tokens"] == 35


def test_the_tokens_are_the_published_packages():
    made = reward.bert_tokenizer(str(image_reward.vocabulary()))
    ids, mask = reward.tokenize(made, pairs.prompts())
    assert hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest() == GOLDEN["ids_sha256"]
    assert ids.shape == (pairs.PAIRS, 35) and int((mask.sum(1) == 35).sum()) >= 8
    assert made.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [30522, 30523]


@pytest.fixture
def damaged(tmp_path, monkeypatch):
    """A little model whose weights may be spoilt."""
    monkeypatch.setenv(image_reward.VARIABLE, str(tmp_path))
    write_little_image_reward(tmp_path)
    image_reward.load_image_reward.cache_clear()
    return tmp_path


def test_weights_that_are_not_whole_are_refused(damaged, images):
    file = damaged / "ImageReward.pt"
    state, whole = torch.load(file, weights_only=True), file.read_bytes()
    for spoil, words in (
        (lambda s: s.pop("mlp.layers.7.bias"), r"1 of \d+ weights are missing.*head.4.bias"),
        (lambda s: s.update(more=torch.zeros(1)), "missing, unknown or of another shape.*more"),
        (lambda s: s.pop("blip.visual_encoder.pos_embed"), "do not fit"),
    ):
        changed = dict(state)
        spoil(changed)
        torch.save(changed, file)
        image_reward.load_image_reward.cache_clear()
        with pytest.raises(LoraqError, match=words):
            compute("image_reward", images.subset([0]))
    file.write_bytes(whole[:100_000])
    image_reward.load_image_reward.cache_clear()
    with pytest.raises(LoraqError, match="cannot be read"):
        compute("image_reward", images.subset([0]))


def test_a_pickle_with_code_is_not_run(damaged, images, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    (damaged / "ImageReward.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(LoraqError, match="cannot be read"):
        compute("image_reward", images.subset([0]))
    assert not (tmp_path / "written").exists()


def test_a_wrong_checksum_is_told_before_anything_runs(damaged):
    (damaged / "ImageReward.pt").write_bytes(b"x")
    (damaged / "SHA256SUMS").write_text(f"{'0' * 64}  ImageReward.pt\n")
    with pytest.raises(LoraqError, match="does not match SHA256SUMS"):
        image_reward.sources(Options())
