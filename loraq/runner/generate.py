"""Prompts → images, videos or sound with the pipeline as diffusers ships it, batch by batch.

A finished batch is never remade. Below, an image is any of these outputs, one for each prompt.

Prompts are split into batches in order. Each image has its own CPU generator, seeded from its name,
so its initial latents depend only on (name, seed).
"""

from __future__ import annotations

import contextlib
import functools
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from loraq.config import GenerateConfig, ModelConfig
from loraq.data import Prompt, seed_of_name
from loraq.errors import LoraqError
from loraq.metrics.common.reading import warn_one_colour
from loraq.models.call import sampling_arguments
from loraq.models.denoisers import device_of
from loraq.models.outputs import output_kind
from loraq.runner import overflow
from loraq.runner.outputs import check_made_size, encode_output, is_blank, outputs_of
from loraq.runner.text import Text, answered, text_part
from loraq.utils import batch_invariance
from loraq.utils.kinds import SUFFIXES, UNITS, Kind
from loraq.utils.memory import reused_heap
from loraq.utils.parts import Claim, Part, alone, make_parts, unfinished
from loraq.utils.pieces import write_piece
from loraq.utils.texts import first_line

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

VERSION = 2
BATCHES = "batches"
OutputType = Literal["pil", "np", "pt", "latent"]


def generators(prompts: Sequence[Prompt], seed: int) -> list[torch.Generator]:
    """One CPU generator per image, seeded from its name and `seed`."""
    import torch

    return [torch.Generator("cpu").manual_seed(seed_of_name(p.name, seed)) for p in prompts]


def image_batch(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    seed: int,
    output_type: OutputType = "pil",
    embeddings: Text | None = None,
) -> Any:
    """The images of one batch from one call of the pipeline, in its `output_type`.

    LoraqError if the latents or the decoded images are not finite.

    embeddings: of the prompts (`embeddings.encode_batch`); without them the pipeline encodes.
    """

    def run() -> Any:
        made = call_pipeline(pipe, model, prompts, seed, output_type, embeddings)
        return outputs_of(pipe, model, made)

    with overflow.finite_images(pipe) as finite:
        images = run()
    if output_type == "latent":
        finite.append(overflow.finite_rows(images))
    overflow.check_finite(pipe, model, prompts, finite, run)
    return images


def call_pipeline(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    seed: int,
    output_type: OutputType,
    embeddings: Text | None = None,
) -> Any:
    """The output of one call of the pipeline; `embeddings` as in `image_batch`."""
    import torch

    if output_type == "pil" and output_kind(model) == "audio":
        output_type = "np"
    text: Mapping[str, Any] = {"prompt": [prompt.prompt for prompt in prompts]}
    if isinstance(embeddings, Mapping):
        text = {"prompt": None, "negative_prompt": None, **embeddings}
    options = {name: value for name, value in model.call.items() if name not in text}
    with torch.inference_mode(), answered(pipe, embeddings):
        try:
            return pipe(
                **text,
                **sampling_arguments(pipe, model),
                generator=generators(prompts, seed),
                output_type=output_type,
                **options,
            )
        except ValueError as error:
            if not _raised_by_pipeline(error):
                raise
            raise LoraqError(
                f"{type(pipe).__name__} does not take these settings: {first_line(error)[:300]}\n"
                f"  Change those of the model: {sampling_arguments(pipe, model)}, "
                f"model.call={model.call}."
            ) from error


def _raised_by_pipeline(error: Exception) -> bool:
    """Whether a pipeline's own check of its arguments raised the error, not a network."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("diffusers.pipelines.")


def batch_images(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    seed: int,
    embeddings: Text | None = None,
) -> list[Any]:
    """The outputs of one batch, bit-identical for every batch size (`batch_limit`).

    A PIL image, a list of them for a video, or samples of sound in an array, for each prompt.
    """
    size = batch_invariance.batch_limit(len(prompts), device_of(pipe))
    images: list[Any] = []
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        text = embeddings and text_part(embeddings, start, len(part))
        images.extend(image_batch(pipe, model, part, seed, embeddings=text))
    return images


def generate_images(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    settings: GenerateConfig,
    folder: Path,
    progress: str | None = "images",
    claim: Claim = alone,
    embeddings: Callable[[int], Text] | None = None,
) -> list[Path]:
    """Write the images into the existing `folder`; their paths in the order of the prompts.

    A batch is finished if its file under `batches/` and its images match their checksums; all other
    batches are made. Raises LoraqError if the disk is full; all files left behind are complete.

    progress: label of the bar; None: no bar. claim: lets several processes share the batches; on
    return all batches are finished, by any process. embeddings: batch number → embeddings;
    without it the pipeline encodes the prompts.
    """
    from tqdm import tqdm

    with contextlib.suppress(FileNotFoundError):  # another process has finished the product
        (folder / BATCHES).mkdir(exist_ok=True)
    pipe.set_progress_bar_config(disable=True)
    cut = batches(prompts, settings.batch_size)
    kind = output_kind(model)
    todo = unfinished([_part(folder, number, batch, kind) for number, batch in enumerate(cut)])
    bar = tqdm(
        total=len(prompts),
        initial=len(prompts) - sum(len(cut[part.number]) for part in todo),
        desc=progress,
        unit=UNITS[kind][:-1],
        disable=progress is None,
    )
    with bar, reused_heap() as trim:

        def make(part: Part) -> Callable[[], None]:
            text = None if embeddings is None else embeddings(part.number)
            batch, started = cut[part.number], time.perf_counter()
            made = _generate_batch(pipe, model, batch, settings.seed, text)
            trim()
            seconds = time.perf_counter() - started
            encode = functools.partial(encode_output, pipe=pipe, model=model)
            return functools.partial(_write_batch, part, batch, made, seconds, encode)

        make_parts(folder, todo, claim, make, lambda part: bar.update(len(cut[part.number])))
    return [image_path(folder, prompt, kind) for prompt in prompts]


def _generate_batch(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    batch: Sequence[Prompt],
    seed: int,
    embeddings: Text | None,
) -> list[Any]:
    images, kind = batch_images(pipe, model, batch, seed, embeddings), output_kind(model)
    if len(images) != len(batch):
        raise LoraqError(
            f"The pipeline made {len(images)} {UNITS[kind]} for {len(batch)} prompts instead of "
            f"one per prompt. Remove the option that changes this from model.call={model.call}."
        )
    check_made_size(images, model)
    blank = [
        prompt.name for prompt, image in zip(batch, images, strict=True) if is_blank(image, model)
    ]
    warn_one_colour(blank, len(batch), f"{UNITS[kind]} of the batch", kind)
    return images


def _write_batch(
    part: Part,
    batch: Sequence[Prompt],
    images: Sequence[Any],
    seconds: float,
    encode: Callable[[Any], bytes],
) -> None:
    """Encode and write a batch; seconds: that it took to generate."""
    done_file, *paths = part.files
    hashes = {}
    for prompt, path, image in zip(batch, paths, images, strict=True):
        hashes[prompt.name] = write_piece(path, encode(image))
    done = {"images": hashes, "seconds": seconds}
    write_piece(done_file, (json.dumps(done, indent=1, sort_keys=True) + "\n").encode())


def image_path(folder: Path, prompt: Prompt, kind: Kind) -> Path:
    """The file of a prompt's image, video or clip."""
    return folder / f"{prompt.name}{SUFFIXES[kind]}"


def _part(folder: Path, number: int, batch: Sequence[Prompt], kind: Kind) -> Part:
    """A batch of images; its first file is written last."""
    done_file = folder / batch_file(number)
    return Part(number, done_file.stem, [done_file, *(image_path(folder, p, kind) for p in batch)])


def batch_file(number: int) -> str:
    """The file with a batch's hashes and seconds, in the folder of the images."""
    return f"{BATCHES}/{number:05d}.json"


def image_files(prompts: Sequence[Prompt], size: int, kind: Kind) -> list[str]:
    """All files of finished images in batches of `size`."""
    numbers = range(len(batches(prompts, size)))
    return [*(f"{p.name}{SUFFIXES[kind]}" for p in prompts), *map(batch_file, numbers)]


def generation_seconds(folder: Path) -> float:
    """Seconds that the batches in `folder` took, summed over all attempts."""
    files = sorted((folder / BATCHES).glob("*.json"))
    return sum(float(json.loads(path.read_text())["seconds"]) for path in files)


def batches(prompts: Sequence[Prompt], size: int) -> list[Sequence[Prompt]]:
    """The prompts in order, `size` at a time."""
    return [prompts[start : start + size] for start in range(0, len(prompts), size)]
