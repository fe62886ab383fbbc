"""Tokenizer, scheduler and class names are tried in the plan, before anything large."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest

from loraq.errors import LoraqError
from loraq.models.parts import SENTENCEPIECE, check_parts
from loraq.runner.estimate import dry_run

EXTRA = [f"<extra_id_{number}>" for number in range(100)]


@pytest.fixture(scope="module")
def vocabulary() -> bytes:
    """A SentencePiece model with T5's special tokens at T5's places."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red cat", "a green dog", "one blue fish"] * 50),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
        **{"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1},
    )
    return model.getvalue()


@pytest.fixture
def pixart(tiny_folder, tmp_path, vocabulary) -> Path:
    """The little pipeline with the tokenizer's files of PixArt-Σ's repository."""
    folder = tmp_path / "pixart"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "tokenizer")
    special = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    special["additional_special_tokens"] = EXTRA
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 100, "legacy": True, **special}
    contents = {
        "added_tokens.json": {token: 138 - n for n, token in enumerate(EXTRA)},
        "special_tokens_map.json": special,
        "tokenizer_config.json": {**config, "model_max_length": 300, "sp_model_kwargs": {}},
    }
    (folder / "tokenizer").mkdir()
    for name, values in contents.items():
        (folder / "tokenizer" / name).write_text(json.dumps(values))
    (folder / "tokenizer" / "spiece.model").write_bytes(vocabulary)
    change(folder / "model_index.json", tokenizer=["transformers", "T5Tokenizer"])
    return folder


def change(path: Path, **values) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_tokenizer_that_is_a_sentencepiece_model_alone_gives_its_tokens(pixart, vocabulary):
    from sentencepiece import SentencePieceProcessor
    from transformers import T5Tokenizer

    check_parts(pixart)
    tokenizer = T5Tokenizer.from_pretrained(pixart / "tokenizer")
    own = SentencePieceProcessor(model_proto=vocabulary)
    for text in ("a red cat", "one blue  dog, unseen words", ""):
        assert tokenizer(text).input_ids == [*own.encode(text), own.eos_id()]


@pytest.mark.parametrize("package", ["sentencepiece", "protobuf"])
def test_a_package_that_the_tokenizer_needs_is_named_in_the_plan(
    package, pixart, overrides, monkeypatch
):
    """PixArt-Σ's tokenizer failed after 22 GB, with a message about another package."""
    (module,) = (module for module, name in SENTENCEPIECE.items() if name == package)
    monkeypatch.delattr("sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.delitem(sys.modules, "sentencepiece.sentencepiece_model_pb2", raising=False)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(LoraqError, match=rf"spiece.model needs a package: pip install {package}$"):
        dry_run([*overrides, "method=rtn", f"model.path={pixart}"])


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("model_index.json", {"tokenizer": ["transformers", "T6Tokenizer"]}, "class T6Tokenizer"),
        (
            "model_index.json",
            {"scheduler": ["diffusers", "DDIMSchedulers"]},
            "class DDIMSchedulers of.*Did you mean DDIMScheduler",
        ),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderXL"]}, "class AutoencoderXL of"),
        ("tokenizer/tokenizer.json", {"model": {"type": "Unknown"}}, "tokenizer' does not load"),
        (
            "scheduler/scheduler_config.json",
            {"algorithm_type": "sde-dpm"},
            "scheduler' does not load as DPMSolverMultistepScheduler .sde-dpm",
        ),
    ],
    ids=["tokenizer", "scheduler", "vae", "tokenizer.json", "scheduler_config.json"],
)
def test_a_part_that_does_not_load_is_named_in_the_plan(
    file, values, words, tiny_folder, tmp_path, overrides
):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    change(folder / file, **values)
    with pytest.raises(LoraqError, match=words):
        dry_run([*overrides, "method=rtn", f"model.path={folder}"])


def test_a_part_without_a_folder_is_named(tiny_folder, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(tiny_folder, folder)
    shutil.rmtree(folder / "scheduler")
    with pytest.raises(LoraqError, match="scheduler' does not load as DPMSolver"):
        check_parts(folder)
