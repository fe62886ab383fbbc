"""Images that are not made of numbers: found after a batch, and traced to their cause only then.

A model whose values exceed the range of its dtype makes NaN or infinity. The pipeline clamps the
pixels and PIL stores NaN as black, so that only the decoder's own output shows them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from loraq.config import ModelConfig
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models.component_names import is_decoder
from loraq.models.denoisers import denoiser_of, parts, step_of
from loraq.models.dtypes import network_dtypes
from loraq.models.loading import image_parts, text_parts

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from loraq.formats import Format
    from loraq.layers.linear import QuantizedLinear

LARGEST_FP16 = 65504.0
WIDER = {"float16": "bfloat16 or float32", "bfloat16": "float32"}
REMEDIES = {
    "float16": "Its range ends at 65504: set model.dtype=bfloat16 or model.dtype=float32.",
    "bfloat16": "Set model.dtype=float32; if that fails too, the weights are damaged.",
    "float32": "The weights are damaged, or the row's recipe makes them so (method=reference runs "
    "the model without it): restore them, or change the recipe.",
}


class _Found(Exception):
    """Stops the pipeline at the first values that are not finite; the message says where.

    remedy: if it is another than that of the model's dtype. dtype: in which they are, if it is not
    the model's.
    """

    def __init__(self, where: str, remedy: str = "", dtype: str = "") -> None:
        super().__init__(where)
        self.where, self.remedy, self.dtype = where, remedy, dtype


def _of_network(where: str, model: ModelConfig, names: Sequence[str]) -> _Found:
    """Values of a network beside the denoiser, with its dtype and how to widen it."""
    dtypes = network_dtypes(model)
    dtype = next((dtypes[name] for name in names if name in dtypes), model.dtype)
    wider = WIDER.get(dtype)
    if not names or wider is None:
        return _Found(where, REMEDIES[dtype], dtype)
    settings = ", ".join(f"{name}: {wider.split()[0]}" for name in names)
    more = f" (or {wider.split()[-1]})" if " " in wider else ""
    return _Found(where, f"Set +model.dtypes={{{settings}}}{more}.", dtype)


@contextlib.contextmanager
def finite_images(pipe: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """Collect whether each decoded image is finite, on its device, without waiting for it."""
    found: list[Tensor] = []

    def check(_module: torch.nn.Module, _args: tuple, decoded: Any) -> None:
        found.append(finite_rows(decoded[0] if isinstance(decoded, tuple) else decoded))

    decoder = getattr(getattr(pipe, "vae", None), "decoder", None)
    handles = [] if decoder is None else [decoder.register_forward_hook(check)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_finite(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    finite: Sequence[Tensor],
    again: Callable[[], Any],
) -> None:
    """LoraqError if an image is not finite; it says what was the first to be so.

    finite: per image or group of images, in the order of `prompts`. again: makes the batch again.
    """
    import torch

    flags = torch.cat(list(finite)).tolist() if finite else []
    if all(flags):
        return
    if len(flags) != len(prompts):  # a video is decoded piece by piece
        flags = [False] * len(prompts)
    bad = [prompt.name for prompt, good in zip(prompts, flags, strict=True) if not good]
    names = ", ".join(f"'{name}'" for name in bad[:3]) + (" …" if len(bad) > 3 else "")
    found = _first_overflow(pipe, model, again)
    raise LoraqError(
        f"{len(bad)} of {len(prompts)} images are not made of numbers ({names}): "
        f"{found.where} NaN or infinite in {found.dtype or model.dtype}. "
        f"{found.remedy or REMEDIES[model.dtype]}"
    )


def _first_overflow(
    pipe: DiffusionPipeline, model: ModelConfig, again: Callable[[], Any]
) -> _Found:
    """What is not finite first: the text's embeddings, a layer, the latents, or the decoder."""
    from loraq.layers.linear import QuantizedLinear  # imports torch; planning imports this module

    step, calls = 0, 0

    def before(_module: torch.nn.Module, args: tuple, given: dict[str, Any]) -> None:
        nonlocal step, calls
        step, calls = step_of(pipe, calls) + 1, calls + 1
        # at first its other inputs are noise and times, and masks of −infinity
        inputs = _floating((args, given)) if calls == 1 else ()
        if any((one.isnan() | one.isposinf()).any() for one in inputs):
            raise _of_network("the text's embeddings are", model, text_parts(model))

    def after(_module: torch.nn.Module, _args: tuple, output: Any) -> None:
        sample = output[0] if isinstance(output, tuple) else output.sample
        sample = sample if isinstance(sample, list | tuple) else [sample]
        if not all(finite_rows(one).all() for one in sample):
            raise _Found(f"the latents at step {step} of {model.steps} are")

    denoiser, hooks = denoiser_of(pipe), []
    for network in parts(denoiser).values():
        hooks.append(network.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(network.register_forward_hook(after))
    for name, module in denoiser.named_modules():
        if isinstance(module, QuantizedLinear):
            hooks.append(module.register_forward_hook(functools.partial(_check_scales, name)))
    try:
        again()
    except _Found as found:
        return found
    finally:
        for hook in hooks:
            hook.remove()
    where = "the latents are finite, the decoder's output is"
    return _of_network(where, model, [name for name in image_parts(model) if is_decoder(name)])


def _check_scales(
    name: str, layer: QuantizedLinear, args: tuple[Tensor, ...], output: Tensor
) -> None:
    """Raise _Found if the input of a packed layer is finite, and too large for its fp16 scales."""
    if finite_rows(output).all() or not finite_rows(args[0]).all():
        return
    transform = layer.tensors.transform
    x = (args[0].movedim(1, -1) if layer.convolution else args[0]).float()
    largest = transform.to(x.device, x.dtype).input(x).abs().amax().item()
    for operand in ("activation", "branch_activation"):
        fmt: Format | None = getattr(layer.tensors, operand)
        if fmt is None or fmt.scale != "fp16":
            continue
        limit = LARGEST_FP16 * fmt.element.maximum
        if largest > limit:
            raise _Found(
                f"the input of '{name}' reaches {largest:.4g}, and {fmt.label} with fp16 scales "
                f"ends at {limit:.4g}, so that its output is",
                f"Set quant.{operand}.scale=bf16, or an MX format.",
            )


def _floating(values: Any) -> Iterator[Tensor]:
    """The tensors of floating point in nested tuples, lists and dictionaries."""
    if isinstance(values, dict):
        values = tuple(values.values())
    if isinstance(values, list | tuple):
        for value in values:
            yield from _floating(value)
    elif hasattr(values, "is_floating_point") and values.is_floating_point():
        yield values


def finite_rows(values: Tensor) -> Tensor:
    """Whether each entry of the first dimension is finite."""
    return values.isfinite().flatten(1).all(1)
