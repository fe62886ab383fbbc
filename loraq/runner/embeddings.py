"""Text embeddings: the pipeline's own, made once for a list of prompts and kept.

    outputs/embeddings/<key>/00000.safetensors    one batch of prompts, as the pipeline returns it

All rows of an experiment read these files, so the text encoder runs once per prompt. A family with
`EMBEDDINGS` keeps these arguments of the pipeline's call; tokens after the last unmasked one are
not stored and are read as zeros: their attention weight is exactly zero, so the images are
bit-identical. Every other pipeline's text is recorded (`recording.py`).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from loraq.config import ModelConfig
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models.call import embedding_names, encodes_apart, text_arguments
from loraq.models.dtypes import text_casts
from loraq.runner import generate as generation
from loraq.runner.recording import RECORDED, Recording, record
from loraq.runner.text import Text
from loraq.utils import batch_invariance
from loraq.utils.parts import Claim, Part, alone, make_parts
from loraq.utils.pieces import write_piece

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_LENGTH = "length"


def encode_prompts(pipe: DiffusionPipeline, model: ModelConfig, prompts: Sequence[Prompt]) -> Text:
    """The text of prompts, independent of the batch: named embeddings [n, …], or a recording."""
    size = batch_invariance.batch_limit(len(prompts), pipe.device.type)
    return _encode(pipe, model, generation.batches(prompts, size))


def encode_batch(pipe: DiffusionPipeline, model: ModelConfig, prompts: Sequence[Prompt]) -> Text:
    """The text of the batch from one call of the pipeline's `encode_prompt`."""
    return _encode(pipe, model, [prompts])


def _encode(
    pipe: DiffusionPipeline, model: ModelConfig, groups: Sequence[Sequence[Prompt]]
) -> Text:
    names, casts = embedding_names(pipe, model), text_casts(model)
    if names:
        parts = [_named(pipe, model, names, prompts) for prompts in groups]
        parts = [{n: x.to(casts.get(x.dtype, x.dtype)) for n, x in part.items()} for part in parts]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    if not encodes_apart(pipe):  # its call gets the prompts
        return Recording([(len(prompts), ()) for prompts in groups], {})

    def call(number: int) -> object:
        return generation.call_pipeline(pipe, model, groups[number], 0, "latent")

    return record(pipe, [len(prompts) for prompts in groups], call, casts)


def _named(
    pipe: DiffusionPipeline, model: ModelConfig, names: Sequence[str], prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """What the pipeline's `encode_prompt` returns, by its names."""
    with torch.inference_mode():
        found = pipe.encode_prompt(
            [prompt.prompt for prompt in prompts],
            do_classifier_free_guidance=model.guided,
            device=pipe.text_encoder.device,
            **text_arguments(pipe, model),
        )
    return {name: tensor for name, tensor in zip(names, found, strict=True) if tensor is not None}


def write_embeddings(
    encode: Callable[[Sequence[Prompt]], Text],
    prompts: Sequence[Prompt],
    size: int,
    folder: Path,
    progress: str | None = None,
    claim: Claim = alone,
) -> None:
    """Write one file per batch of `size` prompts; files that match their checksum are kept.

    encode: `encode_prompts` of a pipeline. progress: label of the bar; None: no bar. claim: lets
    several processes share the batches; on return all are finished, by any process.
    """
    from tqdm import tqdm

    cut = generation.batches(prompts, size)
    paths = [folder / name for name in embedding_files(prompts, size)]
    bar = tqdm(
        total=len(prompts), desc=progress, unit="prompt", disable=progress is None, leave=False
    )

    def make(part: Part) -> Callable[[], object]:
        data = to_bytes(encode(cut[part.number]))
        return functools.partial(write_piece, part.files[0], data)

    parts = [Part(number, path.stem, [path]) for number, path in enumerate(paths)]
    with bar:
        make_parts(folder, parts, claim, make, lambda part: bar.update(len(cut[part.number])))


def embedding_files(prompts: Sequence[Prompt], size: int) -> list[str]:
    """All files of finished embeddings in batches of `size`."""
    return [batch_file(number) for number in range(len(generation.batches(prompts, size)))]


def batch_file(number: int) -> str:
    """The file of a batch's embeddings."""
    return f"{number:05d}.safetensors"


def read_embeddings(folder: Path, number: int, device: str) -> Text:
    """The text of batch `number` from `encode_prompts`; masked tokens may be zeros.

    Raises LoraqError if the file is damaged (and an earlier version finished it all the same).
    """
    return read_text(folder / batch_file(number), device)


def read_text(path: Path, device: str) -> Text:
    """The text in a file of `to_bytes`; LoraqError if it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            metadata = stream.metadata()
            held = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        if RECORDED in metadata:
            return Recording.read(metadata[RECORDED], held)
        lengths = json.loads(metadata[_LENGTH])
    except (OSError, SafetensorError, LookupError, TypeError, ValueError) as error:
        raise LoraqError(f"'{path}' is damaged ({error}); delete it and run again.") from None
    for name, tensor in held.items():
        missing = lengths[name] - tensor.shape[1]
        held[name] = pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)).to(device)
    return held


def to_bytes(text: Text, whole: bool = False) -> bytes:
    """A safetensors file; of named embeddings the tokens that some prompt shows, unless `whole`."""
    from safetensors.torch import save

    if isinstance(text, Recording):
        return text.to_bytes()
    kept = {}
    for name in text:
        masked = f"{name.removesuffix('_attention_mask').removesuffix('_embeds')}_attention_mask"
        shown = text[masked] > 0
        last = int(shown.any(0).nonzero().max()) + 1 if shown.any(1).all() else shown.shape[1]
        kept[name] = text[name][:, : None if whole else last].contiguous().cpu()
    lengths = {name: text[name].shape[1] for name in kept}
    return save(kept, metadata={_LENGTH: json.dumps(lengths)})
