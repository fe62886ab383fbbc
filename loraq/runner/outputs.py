"""The outputs of a pipeline's call as files without loss: PNG, animated PNG, WAV of floats."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loraq.config import ModelConfig
from loraq.errors import LoraqError
from loraq.metrics.common.audio_set import is_silent
from loraq.models.outputs import FIELDS, frame_rate, output_kind
from loraq.utils.kinds import UNITS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

COMPRESSION = 4
"""Level of PNG's compression, which loses nothing at any."""
_DECODERS = ("vocoder", "vae")
_RATES = ("sampling_rate", "sample_rate")


def outputs_of(pipe: DiffusionPipeline, model: ModelConfig, returned: Any) -> Any:
    """The outputs in what the pipeline's call returned, one entry per prompt."""
    kind = output_kind(model)
    found = getattr(returned, FIELDS[kind], None)
    if found is None:
        raise LoraqError(
            f"{type(pipe).__name__} returned no {UNITS[kind]} ({type(returned).__name__} has no "
            f"'{FIELDS[kind]}'). LoRaQ measures images, videos and clips of sound."
        )
    return found


def encode_output(output: Any, pipe: DiffusionPipeline, model: ModelConfig) -> bytes:
    """The bytes of one output's file, by the kind that the model makes."""
    kind = output_kind(model)
    if kind == "audio":
        return encode_wav(output, sampling_rate(pipe))
    return encode_video(output, frame_rate(model)[0]) if kind == "video" else encode_png(output)


def is_blank(output: Any, model: ModelConfig) -> bool:
    """Whether an image or all frames of a video show one colour, or whether a clip is silent."""
    kind = output_kind(model)
    if kind == "audio":
        return is_silent(_channels(output))
    colours = {image.getextrema() for image in (output if kind == "video" else [output])}
    return len(colours) == 1 and all(low == high for low, high in colours.pop())


def check_made_size(outputs: Sequence[Any], model: ModelConfig) -> None:
    """LoraqError if images or frames have another size than the model's settings, and records, say.

    A pipeline may round a size, or take the nearest one in its own table.
    """
    if output_kind(model) == "audio" or model.size is None:
        return
    first = outputs[0] if output_kind(model) == "image" else outputs[0][0]
    if (size := (first.height, first.width)) != model.size:
        raise LoraqError(
            f"The pipeline made {size[0]}x{size[1]} pixels for model.height={model.height}, "
            f"model.width={model.width}. Set model.height={size[0]} model.width={size[1]}."
        )


def encode_png(image: Image) -> bytes:
    """The bytes of a PIL image as PNG."""
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=COMPRESSION)
    return stream.getvalue()


def encode_video(frames: Sequence[Image], rate: float) -> bytes:
    """The bytes of an animated PNG of PIL images, `rate` of them a second; it repeats.

    A video of one frame is a PNG as of an image, without a rate.
    """
    stream = io.BytesIO()
    frames[0].save(
        stream,
        format="PNG",
        save_all=True,
        append_images=frames[1:],
        duration=1000 / rate,
        loop=0,
        # PIL joins equal frames that are blended alike; for opaque pixels both ways are the same
        blend=[number % 2 for number in range(len(frames))],
        compress_level=COMPRESSION,
    )
    return stream.getvalue()


def encode_wav(samples: np.ndarray, rate: int) -> bytes:
    """The bytes of a WAV file of float32 samples, of shape (samples) or (channels, samples)."""
    from scipy.io import wavfile

    stream = io.BytesIO()
    wavfile.write(stream, rate, np.ascontiguousarray(_channels(samples).T))
    return stream.getvalue()


def sampling_rate(pipe: DiffusionPipeline) -> int:
    """Samples per second of the pipeline's sound, from the component that makes it."""
    makers = [getattr(pipe, name, None) for name in _DECODERS]
    for maker in (*(getattr(maker, "config", None) for maker in makers), *makers, pipe):
        for name in _RATES:
            if found := getattr(maker, name, None):
                return int(found)
    raise LoraqError(
        f"{type(pipe).__name__} does not say how many samples a second its sound has: none of "
        f"{', '.join(_DECODERS)} has {' or '.join(_RATES)} in its configuration. Add it to the "
        "config.json of the one that makes the sound."
    )


def _channels(samples: np.ndarray) -> np.ndarray:
    return np.atleast_2d(np.asarray(samples, np.float32))
