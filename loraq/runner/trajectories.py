"""Teacher-forced output errors of quantised layers along the 16-bit model's trajectory.

    error(step) = ‖f̂(z, t, c) − f(z, t, c)‖ / ‖f(z, t, c)‖        f 16-bit, f̂ with quantised layers

Teacher forcing: every forward reads the inputs (z, t, c) of the 16-bit run, so that the error of a
step does not contain the accumulated errors of earlier steps.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraq.config import ModelConfig
from loraq.data import Prompt
from loraq.errors import LoraqError
from loraq.models.denoisers import denoiser_of, parts, step_of
from loraq.models.layers import Layer
from loraq.quantization.model import QuantizedModel
from loraq.runner.generate import batches, image_batch
from loraq.runner.text import Text

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, eq=False)
class Forward:
    """One recorded call: step in its batch, inputs and output (on the CPU), the expert if several.

    part: of the denoiser (`models/denoisers.py`).
    """

    step: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    part: str = ""

    def __repr__(self) -> str:
        return f"Forward(step={self.step}, output={tuple(self.output.shape)})"

    def squared_error(self, transformer: nn.Module) -> Tensor:
        """[‖f̂ − f‖², ‖f‖²] of this forward, summed in float64, on the transformer's device."""
        network = parts(transformer)[self.part]
        tensors = chain(network.parameters(), network.buffers())  # one may be empty
        device = next(tensors).device
        args, kwargs = _mapped((self.args, self.kwargs), lambda tensor: tensor.to(device))
        output = _sample(network(*args, **kwargs))[:, : self.output.shape[1]].double()
        reference = self.output.to(device).double()
        return torch.stack([x.square().sum() for x in (output - reference, reference)])


def record_forwards(
    pipe: DiffusionPipeline,
    model: ModelConfig,
    prompts: Sequence[Prompt],
    seed: int,
    batch_size: int,
    every: int = 1,
    embeddings: Callable[[int], Text] | None = None,
) -> list[Forward]:
    """Run the 16-bit pipeline as generation does (up to the latents) and record its forwards.

    Records the calls of steps 0, every, 2·every, … of each batch, in order, on the CPU and in the
    model's dtype: per call the latents and the output (twice with guidance, or in two calls);
    inputs that do not change between calls, such as the text, once per batch. Output channels that
    the sampler does not read (a learned variance) are dropped. Raises LoraqError without prompts,
    or if batch_size or every is below 1.

    embeddings: batch number → embeddings; without it the pipeline encodes the prompts.
    """
    if not prompts or batch_size < 1 or every < 1:
        raise LoraqError(
            f"{len(prompts)} prompts, batch_size={batch_size}, every={every}: the lower limit of "
            "each is 1. Pass at least one prompt, batch_size ≥ 1 and every ≥ 1."
        )
    kept: list[Forward] = []
    for number, batch in enumerate(batches(prompts, batch_size)):
        text = None if embeddings is None else embeddings(number)
        recorder = _Recorder(kept, every, pipe)
        handles = [
            network.register_forward_hook(recorder.of(part), with_kwargs=True)
            for part, network in parts(denoiser_of(pipe)).items()
        ]
        try:
            image_batch(pipe, model, batch, seed, "latent", text)
        finally:
            for handle in handles:
                handle.remove()
    return kept


class _Recorder:
    """Forward hooks for one batch that record the calls of every `every`-th step.

    pipe: the pipeline, whose scheduler counts the steps.
    """

    def __init__(self, kept: list[Forward], every: int, pipe: DiffusionPipeline) -> None:
        self.kept, self.every, self.pipe = kept, every, pipe
        self.calls = 0
        self.latest: list[Tensor] = []

    def __repr__(self) -> str:
        return f"_Recorder({len(self.kept)} forwards after {self.calls} calls)"

    def of(self, part: str) -> Callable[..., None]:
        """The hook of one of the denoiser's parts."""
        return functools.partial(self._keep, part)

    def _keep(
        self, part: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any
    ) -> None:
        step, self.calls = step_of(self.pipe, self.calls), self.calls + 1
        if step % self.every:
            return
        held: list[Tensor] = []

        def copied(tensor: Tensor) -> Tensor:
            # a copy even on the CPU: the sampler may write into its tensors in place
            copy = tensor.detach().to("cpu", copy=True)
            held.append(next((old for old in self.latest if _same(old, copy)), copy))
            return held[-1]

        own_args, own_kwargs = _mapped((args, kwargs), copied)
        sample = _sample(output)
        read = getattr(getattr(module, "config", None), "in_channels", None)
        if sample.dim() == 4 and sample.shape[1] == 2 * (read or 0):  # (B, C, H, W), no tokens
            sample = sample[:, :read]
        copy = sample.detach().to("cpu", copy=True)
        self.kept.append(Forward(step, own_args, own_kwargs, copy, part))
        self.latest = held


@torch.inference_mode()
def output_errors(transformer: nn.Module, forwards: Sequence[Forward]) -> list[float]:
    """‖f̂ − f‖ / ‖f‖ of each recorded step in ascending order, pooled over the batches."""
    sums: dict[int, list[float]] = {}
    errors = squared_errors(transformer, check_recorded(forwards))
    for forward, pair in zip(forwards, errors, strict=True):
        entry = sums.setdefault(forward.step, [0.0, 0.0])
        for place, value in enumerate(pair):
            entry[place] += value
    return [math.sqrt(sums[step][0] / sums[step][1]) for step in sorted(sums)]


def squared_errors(
    transformer: nn.Module, forwards: Sequence[Forward]
) -> list[tuple[float, float]]:
    """(‖f̂ − f‖², ‖f‖²) of each forward; the host waits once for all of them."""
    found = torch.stack([forward.squared_error(transformer) for forward in forwards]).tolist()
    for forward, (error, norm) in zip(forwards, found, strict=True):
        if not (math.isfinite(error) and norm > 0):
            raise LoraqError(
                f"The transformer's output at step {forward.step} has the error {error} and the "
                f"norm {norm}, which give no relative error. The quantised layers or the 16-bit "
                "model make values that are not finite: use a wider model.dtype, or another recipe."
            )
    return [(error, norm) for error, norm in found]


def errors_by_role(
    transformer: nn.Module,
    quantized: QuantizedModel,
    layers: Sequence[Layer],
    forwards: Sequence[Forward],
) -> dict[str, list[float]]:
    """`output_errors` with all layers quantised ("all"), and with the layers of one role only.

    layers: all layers of the model. Those that are not in `quantized` stay in 16 bits. Raises
    LoraqError if a quantised layer is not in `layers`.
    """
    roles = {layer.name: layer.role for layer in layers if layer.name in quantized.layers}
    nameless = [name for name in quantized.layers if name not in roles]
    if nameless:
        raise LoraqError(
            f"{len(nameless)} quantised layers have no role, such as '{nameless[0]}'. Pass all "
            "layers of the model."
        )
    chosen = {"all": list(roles)}
    for name, role in roles.items():
        chosen.setdefault(role, []).append(name)
    errors = {}
    for part, names in chosen.items():
        with quantized.subset(names).applied(transformer):
            errors[part] = output_errors(transformer, forwards)
    return errors


def check_recorded(forwards: Sequence[Forward]) -> Sequence[Forward]:
    """The forwards; LoraqError for none."""
    if not forwards:
        raise LoraqError("No forwards were recorded. Record at least one with record_forwards.")
    return forwards


def _sample(output: Any) -> Tensor:
    """The output tensor: diffusers returns it in a tuple or as `.sample`, or a list for a batch."""
    sample = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    return torch.stack(sample) if isinstance(sample, list) else sample


def _same(a: Tensor, b: Tensor) -> bool:
    layout = (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
    return layout and torch.equal(a, b)


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`value` with `function` applied to every tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _mapped(entry, function) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_mapped(entry, function) for entry in value)
    return value
