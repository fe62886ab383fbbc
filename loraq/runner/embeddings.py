"""Text embeddings: the pipeline's own, made once for a list of prompts and kept.

    outputs/embeddings/<key>/00000.safetensors    one batch of prompts, as the pipeline returns it

All rows of an experiment read these files, so the text encoder runs once per prompt. Tokens after
the last unmasked one are not stored and are read as zeros: their attention weight is exactly zero,
so the images are bit-identical.
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
from loraq.models.call import text_arguments
from loraq.runner import generate as generation
from loraq.utils import batch_invariance
from loraq.utils.parts import Claim, Part, alone, make_parts
from loraq.utils.pieces import write_piece

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

NAMES = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
"""What `encode_prompt` of every supported pipeline returns and `__call__` accepts, in order."""
_LENGTH = "length"


def encode_prompts(
    pipe: DiffusionPipeline, model: ModelConfig, prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """Embeddings [n, tokens, width] and masks [n, tokens] of prompts, independent of the batch."""
    batch_limit = batch_invariance.batch_limit(len(prompts), pipe.text_encoder.device.type)
    parts = [encode_batch(pipe, model, part) for part in generation.batches(prompts, batch_limit)]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def encode_batch(
    pipe: DiffusionPipeline, model: ModelConfig, prompts: Sequence[Prompt]
) -> dict[str, Tensor]:
    """Embeddings and masks of the batch from one call of the pipeline's `encode_prompt`."""
    with torch.inference_mode():
        found = pipe.encode_prompt(
            [prompt.prompt for prompt in prompts],
            do_classifier_free_guidance=model.guidance > 1.0,
            device=pipe.text_encoder.device,
            **text_arguments(pipe, model),
        )
    pairs = zip(NAMES, found, strict=True)
    return {name: tensor for name, tensor in pairs if tensor is not None}


def write_embeddings(
    encode: Callable[[Sequence[Prompt]], dict[str, Tensor]],
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
        data = _to_safetensors(encode(cut[part.number]))
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


def read_embeddings(folder: Path, number: int, device: str) -> dict[str, Tensor]:
    """Embeddings of batch `number` from `encode_prompts`; masked tokens may be zeros.

    Raises LoraqError if the file is damaged (and an earlier version finished it all the same).
    """
    from safetensors import SafetensorError, safe_open

    path = folder / batch_file(number)
    try:
        with safe_open(path, framework="pt") as stream:
            lengths = json.loads(stream.metadata()[_LENGTH])
            held = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise LoraqError(f"'{path}' is damaged ({error}); delete it and run again.") from None
    for name, tensor in held.items():
        missing = lengths[name] - tensor.shape[1]
        held[name] = pad(tensor, (0, 0) * (tensor.dim() - 2) + (0, missing)).to(device)
    return held


def _to_safetensors(tensors: dict[str, Tensor]) -> bytes:
    """A safetensors file of the tokens up to the last one unmasked in any prompt of the batch."""
    from safetensors.torch import save

    kept = {}
    for name in NAMES[::2]:
        if name not in tensors:
            continue
        masked = f"{name.removesuffix('_embeds')}_attention_mask"
        shown = tensors[masked] > 0
        last = int(shown.any(0).nonzero().max()) + 1 if shown.any(1).all() else shown.shape[1]
        for part in (name, masked):
            kept[part] = tensors[part][:, :last].contiguous().cpu()
    lengths = {name: tensors[name].shape[1] for name in kept}
    return save(kept, metadata={_LENGTH: json.dumps(lengths)})
