"""Tokenizers of the published classes, built in memory, and the smallest text encoders.

A byte-pair vocabulary is learned from a few sentences, so that their words are one token each, as
in the published vocabularies (Qwen-Image drops the first 34 tokens of its template by number).
"""

from __future__ import annotations

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from tests.little import draw_parameters

if TYPE_CHECKING:
    import transformers

WIDTH = 32  # of every text encoder
TEXTS = (
    "a one red green blue cat dog fish",
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\nassistant\n",
    SYSTEM_MESSAGE,
)
CHAT = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL_CHAT = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}[SYSTEM_PROMPT]{% else %}[INST]{% endif %}"
    "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "{% if m['role'] != 'system' %}[/INST]{% endif %}{% endfor %}"
)


def t5_tokenizer() -> Any:
    """A unigram tokenizer of whole words and letters."""
    import transformers

    words = dict.fromkeys(w for text in TEXTS for w in text.replace("\n", " ").split())
    letters = dict.fromkeys(letter for word in words for letter in word)
    pieces = [("▁", -8.0), *((f"▁{w}", -2.0) for w in words), *((c, -9.0) for c in letters)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    known = {piece for piece, _ in special}
    vocabulary = special + [p for p in dict(pieces).items() if p[0] not in known]
    return transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=64)


def clip_tokenizer() -> Any:
    """CLIP's byte pairs with the ends of words marked; 16 tokens at most."""
    import transformers

    vocabulary, merges = _byte_pairs(("<|startoftext|>", "<|endoftext|>"), "</w>")
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


def qwen_tokenizer() -> Any:
    """Qwen2's byte pairs with its chat template."""
    import transformers

    special = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary, merges = _byte_pairs(special)
    return transformers.Qwen2Tokenizer(
        vocab=vocabulary,
        merges=merges,
        additional_special_tokens=list(special[1:]),
        chat_template=CHAT,
    )


def gemma_tokenizer() -> Any:
    """Gemma's byte pairs with spaces as ▁."""
    import transformers

    special = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    vocabulary, merges = _byte_pairs(special, space="▁")
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=merges)


def pixtral_processor() -> Any:
    """Pixtral's processor with a byte-pair tokenizer and the order of Mistral's chat template."""
    import transformers

    special = ("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]")
    images = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    vocabulary, merges = _byte_pairs((*special, *images))
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(m) for m in merges]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=[*special[4:], *images],
        padding_side="left",
    )
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(),
        tokenizer=tokenizer,
        chat_template=MISTRAL_CHAT,
    )


@cache
def _byte_pairs(
    special: tuple[str, ...], end_of_word: str = "", space: str = ""
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges that make every word of TEXTS one token."""
    ending = {"end_of_word_suffix": end_of_word} if end_of_word else {}
    core = Tokenizer(models.BPE(**ending))
    if space:
        core.pre_tokenizer = pre_tokenizers.Metaspace(replacement=space, prepend_scheme="never")
    elif end_of_word:
        core.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=list(special),
        initial_alphabet=[] if end_of_word or space else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        **ending,
    )
    core.train_from_iterator(TEXTS, trainer)
    state = json.loads(core.to_str())["model"]
    return state["vocab"], [tuple(merge) for merge in state["merges"]]


def t5_encoder(tokenizer: Any) -> transformers.T5EncoderModel:
    """A T5 encoder of one layer."""
    import transformers

    config = transformers.T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=16,
        d_ff=64,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return transformers.T5EncoderModel(config)


def clip_encoder(tokenizer: Any, width: int = WIDTH, projection: bool = False) -> Any:
    """A CLIP text encoder of two layers; with its projection, as SD3 needs, or without."""
    import transformers

    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return kind(config)


def decoder_sizes(tokenizer: Any, layers: int = 2) -> dict[str, Any]:
    """Configuration of a little decoder-only language model."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        **{f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("pad", "eos", "bos")},
    }


def gemma_encoder(tokenizer: Any) -> transformers.Gemma2Model:
    """A Gemma 2 decoder of one layer."""
    import transformers

    model = transformers.Gemma2Model(
        transformers.Gemma2Config(**decoder_sizes(tokenizer, layers=1))
    )
    draw_parameters(model)
    return model
