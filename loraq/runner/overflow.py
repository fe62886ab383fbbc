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
from loraq.models.denoisers import denoiser_of, parts, step_of

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline
    from torch import Tensor

    from loraq.formats import Format
    from loraq.layers.linear import QuantizedLinear

LARGEST_FP16 = 65504.0
REMEDIES = {
    "float16": "Its range ends at 65504: set model.dtype=bfloat16 or model.dtype=float32.",
    "bfloat16": "Set model.dtype=float32; if that fails too, the weights are damaged.",
    "float32": "The weights are damaged, or the row's recipe makes them so (method=reference runs "
    "the model without it): restore them, or change the recipe.",
}


class _Found(Exception):
    """Stops the pipeline at the first values that are not finite; the message says where.

    remedy: if it is another than that of the model's dtype.
    """

    def __init__(self, where: str, remedy: str = "") -> None:
        super().__init__(where)
        self.where, self.remedy = where, remedy


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
        f"{found.where} NaN or infinite in {model.dtype}. {found.remedy or REMEDIES[model.dtype]}"
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
        text = given.get("encoder_hidden_states")
        if hasattr(text, "isfinite") and not finite_rows(text).all():
            raise _Found("the text's embeddings are")

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
    return _Found("the latents are finite, the decoder's output is")


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


def finite_rows(values: Tensor) -> Tensor:
    """Whether each entry of the first dimension is finite."""
    return values.isfinite().flatten(1).all(1)
