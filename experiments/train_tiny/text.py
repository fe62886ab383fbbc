"""The subword tokenizer and the small T5 encoder.

Byte-level BPE over every emoji caption: any word becomes known pieces, there is no unknown token.
"""

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
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

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


def encoder(settings: Settings = SETTINGS) -> T5EncoderModel:
    """Return an untrained two-layer T5 encoder of width ``text_width``."""
    torch.manual_seed(settings.seed + 1)
    config = T5Config(
        vocab_size=settings.vocab_size,
        d_model=settings.text_width,
        d_kv=64,
        d_ff=2 * settings.text_width,
        num_layers=2,
        num_heads=settings.text_width // 64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        use_cache=False,
    )
    return T5EncoderModel(config)


def tokens(
    tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 [n, length] each, padded and cut as the pipeline does."""
    out = tokenizer(
        captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    )
    return out.input_ids, out.attention_mask
