"""A network without weights that runs: every parameter is one zero, every product is skipped.

A forward on the meta device fails where a model reads values (lengths of masks, chosen experts).
Here all other operations run on the CPU with real values, on a few tokens, in milliseconds for a
network of any size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from loraq.models.networks import without_weights

Note = Callable[[str, nn.Module, Tensor], None]


def build_skeleton(kind: Any, config: dict[str, Any], note: Note) -> nn.Module:
    """The network of class `kind` with `config`, whose linear layers return zeros.

    note: called with name, module and input at every call of a linear layer or convolution.
    """
    network: nn.Module = without_weights(kind, config, buffers=True)
    for name, module in network.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros((), dtype=torch.float32).expand(parameter.shape)
                module._parameters[key] = nn.Parameter(zero, requires_grad=False)
        if isinstance(module, nn.Linear):
            module.forward = functools.partial(_linear, note, name, module)
        elif isinstance(module, _ConvNd) and not module.transposed:
            module.forward = functools.partial(_convolution, note, name, module)
    return network.eval()


def _linear(note: Note, name: str, module: nn.Linear, x: Tensor) -> Tensor:
    note(name, module, x)
    return x.new_zeros(*x.shape[:-1], module.out_features)


def _convolution(note: Note, name: str, module: Any, x: Tensor) -> Tensor:
    note(name, module, x)
    weight = module.weight.to("meta")
    shape = module._conv_forward(x.to("meta", weight.dtype), weight, None).shape
    return x.new_zeros(shape)
