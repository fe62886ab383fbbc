"""The subword tokenizer: byte-level BPE trained on all emoji captions, without unknown tokens."""

from __future__ import annotations

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from .settings import SETTINGS, Settings

PAD, EOS, UNK = "<pad>", "</s>", "<unk>"


def tokenizer(captions: list[str], settings: Settings = SETTINGS) -> PreTrainedTokenizerFast:
    """Return a lower-casing byte-level BPE trained on the captions; every sequence ends in
    ``</s>``."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=[PAD, EOS, UNK],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(captions), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", special_tokens=[(EOS, bpe.token_to_id(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        model_max_length=settings.text_length,
    )


def tokens(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [n, length] each, padded and truncated as in the pipeline."""
    out = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return out.input_ids, out.attention_mask
