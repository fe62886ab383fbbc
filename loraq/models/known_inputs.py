"""Layer inputs that the weights determine, for any transformer: found by running it without data.

Most layers of a diffusion transformer read a normalisation, x = n·(1 + scale(t)) + shift(t) with
the timestep's embedding in all forms of adaLN, or x = n·weight + bias. Each class writes it in its
own way, so it is measured: a copy of the network runs with n = 0 in its normalisations, which gives
shift, and with n = 1, which gives shift + 1 + scale. Layers of the blocks return noise instead of
products. A third run has n = 0 again and other latents, text and noise: an input that is not the
same depends on data and stays unknown.

Conditions that come with the timestep keep one value: guidance FLUX's usual 3.5, pooled text 0,
sizes 1. The copy runs in float32 on the CPU, on a few tokens; it holds no weights of the blocks'
layers, and those of other linear layers (modulation is a third of FLUX.1) one after the other.

Letters: T timesteps, I channels.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from loraq.models.denoisers import joined, parts
from loraq.models.discovery.arguments import InputShape, arguments
from loraq.models.discovery.skeleton import build_skeleton
from loraq.models.discovery.structure import EMBEDS, MODULATES, Found, structure_of
from loraq.models.family import Family
from loraq.models.moments import Moment, Moments, linear, modulated, timesteps
from loraq.utils.lazy_mapping import LazyMapping

GUIDANCE = 3.5
RUNS = (0, 1, 0)
"""The normalisations' value in the three runs, which are parts of one batch."""
_DATA = re.compile(r"(encoder_)?hidden_states(_.*)?|x|cap_feats|text_bth")
_TIMES = ("timestep", "timesteps", "t", "timestep_r", "r_timestep")
_NORMALIZATION = re.compile(r".*(Layer|RMS)Norm")


def known_inputs(denoiser: nn.Module, family: Family) -> Mapping[str, Moment]:
    """Moments by input id of the layer inputs that follow from the weights; empty if none does.

    Each (I, I) matrix is computed when it is read.
    """
    known: dict[str, Moments] = {}
    for part, network in parts(denoiser).items():
        found = probed_inputs(network, family)
        known |= {joined(part, input_id): moments for input_id, moments in found.items()}
    return LazyMapping(list(known), lambda input_id: known[input_id].pooled())


def probed_inputs(network: nn.Module, family: Family) -> dict[str, Moments]:
    """Moments at every timestep by input id, for one transformer; on its device.

    The input of an attention's output layer is a mean of values over tokens, treated as one value.
    """
    structure = structure_of(network, family)
    if structure.untraced:
        return {}
    layers = {layer.name: layer for layer in structure.layers if layer.quantizable}
    probe = _Probe(network, layers)
    with torch.no_grad(), probe:
        probe.run(structure.layout, family)
    device = next(network.parameters()).device
    known: dict[str, Moments] = {}
    for name, x in probe.read.items():
        if moments := _moments(x):
            known[layers[name].input_id] = moments.to(device)
    return known | _means_of_values(network, layers.values(), known)


def _moments(x: Tensor) -> Moments | None:
    """Of an input x (3·T, …, I) in the three runs; None if it depends on data."""
    if len(x) % len(RUNS):
        return None
    shift, one, again = x.reshape(len(RUNS), len(x) // len(RUNS), -1, x.shape[-1]).unbind(0)
    same_for_tokens = torch.allclose(shift, shift[:, :1].expand_as(shift))
    if not (shift.equal(again) and same_for_tokens):
        return None
    return modulated(shift[:, 0], (one - shift)[:, 0] - 1)


def _means_of_values(
    network: nn.Module, layers: Iterable[Found], known: Mapping[str, Moments]
) -> dict[str, Moments]:
    """Moments of the inputs of attentions' output layers, where those of the values are known."""
    by_role = {(layer.block, layer.role): layer for layer in layers}
    made: dict[str, Moments] = {}
    for (block, role), layer in by_role.items():
        values = by_role.get((block, re.sub(r"(self|context)_out", r"\1_v", role)))
        if values is None or values is layer or values.input_id not in known:
            continue
        if layer.shape[1] == values.shape[0]:
            made[layer.input_id] = linear(known[values.input_id], network, values.name)
    return made


class _Probe(TorchFunctionMode):
    """A copy of a network in which `layers` return noise; `read`: their inputs."""

    def __init__(self, network: Any, layers: Mapping[str, Found]) -> None:
        super().__init__()
        self.read: dict[str, Tensor] = {}
        self._network, self._layers, self._time = network, layers, 0.0
        self._images = len(RUNS)
        self._generator = torch.Generator().manual_seed(0)
        self._copy: Any = build_skeleton(type(network), dict(network.config), lambda *_: None)
        blocks = tuple(f"{layer.block}." for layer in layers.values())
        for name, module in self._copy.named_modules():
            if name in layers and layers[name].reason not in (MODULATES, EMBEDS):
                module.forward = functools.partial(self._noisy, name, module)
            elif isinstance(module, nn.Linear):
                module.forward = functools.partial(self._linear, name)
            else:
                self._take_parameters(name, module)
            if name.startswith(blocks) and _is_normalization(module):
                module.forward = functools.partial(self._normalized, module)
            if "Timestep" in type(module).__name__:
                module.register_forward_pre_hook(self._see_time)

    def run(self, layout: str, family: Family) -> None:
        """One forward of all three runs, of timesteps 0 … 999, or 0 … 1 if the network scales."""
        self._copy(**self._arguments(layout, family, torch.ones(len(RUNS))))
        times = timesteps(last=1 if self._time > 100 else 999)
        self._copy(**self._arguments(layout, family, times.repeat(len(RUNS))))

    def _arguments(self, layout: str, family: Family, times: Tensor) -> dict[str, Any]:
        self._images = len(times)
        if family.example_inputs is None:
            given = arguments(self._copy, InputShape(images=len(times)), layout)
        else:
            given = dict(family.example_inputs(self._copy, images=len(times), side=None, tokens=2))
        return {
            name: times if name in _TIMES else self._argument(name, value)
            for name, value in given.items()
        }

    def _argument(self, name: str, value: Any) -> Any:
        """Data is random, the same in the first two runs; conditions are constants."""
        if _DATA.fullmatch(name) and isinstance(value, list):
            draws = self._random([len(value), *value[0].shape])
            return list(draws)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if _DATA.fullmatch(name):
            return self._random(value.shape)
        if name == "guidance":
            return value * GUIDANCE
        return torch.zeros_like(value) if name == "pooled_projections" else value

    def _random(self, shape: Sequence[int]) -> Tensor:
        """Normal values (3·T, …) that are equal in the first two runs."""
        if shape[0] % len(RUNS):
            return torch.randn(*shape, generator=self._generator)
        first, last = torch.randn(2, shape[0] // len(RUNS), *shape[1:], generator=self._generator)
        return torch.cat([first, first, last])

    def _tokens_first(self, shape: Sequence[int]) -> bool:
        """Whether the batch is the second axis, as in blocks of ERNIE-Image."""
        return len(shape) > 2 and shape[0] != self._images == shape[1]

    def _normalized(self, module: nn.Module, x: Tensor) -> Tensor:
        """The value of each run in all channels, times weight, plus bias."""
        axis = 1 if self._tokens_first(x.shape) else 0
        n = torch.tensor(RUNS, dtype=x.dtype).repeat_interleave(x.shape[axis] // len(RUNS))
        n = n.view(*[1] * axis, -1, *[1] * (x.dim() - 1 - axis)).expand_as(x)
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        n = n if weight is None else n * weight
        return n if bias is None else n + bias

    def _noise(self, shape: Sequence[int], axis: int = -1) -> Tensor:
        """An output: one random value for each run and channel."""
        if self._tokens_first(shape):
            return self._noise([shape[1], shape[0], *shape[2:]], axis).transpose(0, 1)
        if shape[0] % len(RUNS):
            return self._random(shape)
        view = [1] * len(shape)
        view[axis] = shape[axis]
        runs = self._random([len(RUNS), shape[axis]]).view(len(RUNS), *view)
        return runs.expand(-1, shape[0] // len(RUNS), *shape[1:]).reshape(*shape)

    def _noisy(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            self.read[name] = x.movedim(1, -1)
            return self._noise([len(x), module.out_channels, *x.shape[2:]], axis=1)
        self.read[name] = x.transpose(0, 1) if self._tokens_first(x.shape) else x
        return self._noise([*x.shape[:-1], self._layers[name].shape[0]])

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """The product with the network's own weight, which is held no longer than that."""
        if name in self._layers:
            self.read[name] = x
        own = self._network.get_submodule(name)
        bias = None if own.bias is None else _as_copied(own.bias)
        return functional.linear(x, _as_copied(own.weight), bias)

    def _take_parameters(self, name: str, module: nn.Module) -> None:
        """The network's own values and computation for a module that is no linear layer."""
        module.__dict__.pop("forward", None)
        for key, parameter in self._network.get_submodule(name)._parameters.items():
            if parameter is not None:
                module._parameters[key] = nn.Parameter(_as_copied(parameter), requires_grad=False)

    def _see_time(self, module: Any, given: tuple[Any, ...]) -> None:
        """The value of a timestep of 1 where it is embedded: 1000 if the network scales."""
        if given and isinstance(given[0], Tensor):
            value = given[0].flatten()[0].item() * getattr(module, "scale", 1)
            self._time = max(self._time, value)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """An attention returns noise: it would cost most."""
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        q, _, v = (*args, *(kwargs[n] for n in ("query", "key", "value") if n in kwargs))[:3]
        return self._noise([*q.shape[:-1], v.shape[-1]])


def _as_copied(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32)


def _is_normalization(module: nn.Module) -> bool:
    return bool(_NORMALIZATION.fullmatch(type(module).__name__)) and not any(module.children())
