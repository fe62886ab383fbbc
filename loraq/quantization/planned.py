"""What a recipe will make, without values: the packed layers, and the work of a step with them.

    step_work(build, blocks, …)    the kernels of one forward of the transformer
    planned_layers(layers, recipe) shapes and formats of the packed layers, on the meta device

The real modules run on meta tensors, once with one block and once with two: the other blocks are
like the second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from loraq.config import Recipe
from loraq.formats import Format, QuantizedTensor, stored_shapes
from loraq.layers.backends import IDENTITY, Compute, Emulated
from loraq.layers.equation import QuantizedInput
from loraq.layers.linear import QuantizedLinear
from loraq.layers.shared_input import share_inputs
from loraq.layers.stacked import stack
from loraq.layers.tensors import LayerTensors
from loraq.models.example_inputs import example_inputs
from loraq.models.layers import Layer, list_layers
from loraq.quantization.budget import choose_rank
from loraq.quantization.grouping import make_units
from loraq.transforms.input_transform import GELU_SHIFT, InputTransform
from loraq.utils.work import Counted, Work


@dataclass(frozen=True)
class StepShape:
    """The inputs of one forward.

    images: of the batch, twice as many with guidance. side: of the square latents. tokens: of a
    prompt. dtype: the model's.
    """

    images: int
    side: int
    tokens: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """The work of one forward, and the peak of its activations in bytes, without weights."""

    work: Work
    peak: int


def step_work(
    build: Callable[[int], nn.Module],
    blocks: int,
    family: str,
    shape: StepShape,
    recipe: Recipe | None = None,
    fused: bool = False,
) -> Step:
    """One forward of a transformer with `blocks` blocks, quantised by `recipe` and emulated.

    build: number of blocks → the transformer on the meta device. fused: as on a GPU, where one
    kernel transforms and quantises, instead of PyTorch's operations one after the other.
    """
    counted = []
    for count in range(1, min(blocks, 2) + 1):
        transformer = nn.Module.to(build(count), shape.dtype).eval()
        if recipe is not None:
            layers = list_layers(transformer, family, recipe.skip)
            _apply(transformer, planned_layers(layers, recipe), fused)
        inputs = example_inputs(transformer, shape.images, shape.side, shape.tokens)
        with torch.no_grad():
            transformer(**inputs)  # the first forward prepares the operands
            with Counted() as found:
                transformer(**inputs)
        counted.append(found)
    last = counted[-1]
    block = last.work.plus(counted[0].work, -1)
    return Step(last.work.plus(block, blocks - len(counted)), last.peak)


class _FusedQuantizer(Emulated):
    """The traffic of `layers/stacked.py` on a GPU: each quantiser one kernel, one product for y."""

    def __init__(self, tensors: LayerTensors, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(tensors, dtype, device)
        self.weight_OI, self.left_OR = stack(self.weight_OI, self.left_OR), None

    def quantize(self, x: Tensor, transform: InputTransform = IDENTITY) -> QuantizedInput:
        arguments, formats = self.input_arguments, {self.input_arguments["activation"]}
        stacked = x.new_empty(*x.shape[:-1], self.weight_OI.shape[1])
        right_RI = arguments["right_RI"]
        if right_RI is not None:
            formats.add(arguments["branch_activation"])
        # a copy reads x once and writes it once for each format
        copies = x.expand(len(formats), *x.shape).clone()
        if right_RI is not None:
            (copies[-1] @ right_RI.mT).clone()
        return QuantizedInput(stacked, None)

    def multiply(self, quantized: QuantizedInput) -> Tensor:
        return linear(quantized.main, self.weight_OI, self.bias_O)


class _FusedLinear(QuantizedLinear):
    def _prepare(self, x: Tensor) -> tuple[InputTransform, Compute]:
        if self._cache is None:
            compute = _FusedQuantizer(self.tensors, x.dtype, x.device)
            transform = self.tensors.transform.to(x.device, compute.dtype)
            self._cache = (x.dtype, x.device), transform, compute
        return self._cache[1], self._cache[2]


def _apply(transformer: nn.Module, planned: dict[str, LayerTensors], fused: bool) -> None:
    """Replace the layers by modules of the planned tensors, in place."""
    kind = _FusedLinear if fused else QuantizedLinear
    modules = []
    for name, tensors in planned.items():
        module = kind(tensors, isinstance(transformer.get_submodule(name), nn.Conv2d))
        transformer.set_submodule(name, module, strict=True)
        modules.append(module)
    share_inputs(modules)


def planned_layers(layers: Sequence[Layer], recipe: Recipe) -> dict[str, LayerTensors]:
    """What quantising `layers` by `recipe` stores, on the meta device, by layer.

    Layers that share an input share R and the transform. All layers have the uniform rank and the
    formats of the recipe, whatever `allocation` would give them.
    """
    units = make_units(layers, recipe.branch.share_qkv)
    rank, formats = choose_rank(units, recipe), recipe.formats()
    planned = {}
    for unit in units:
        width = unit.shape[1]
        shift = GELU_SHIFT if recipe.transform.shift and unit.after_gelu else 0.0
        activation = formats["activation"]
        if shift:
            activation = replace(activation, name="uint4", family="uint")
        transform = _transform(recipe, width, shift)
        right = _packed((rank, width), formats["branch_weight"]) if rank else None
        for layer in unit.layers:
            planned[layer.name] = LayerTensors(
                weight=_packed(layer.shape, formats["weight"]),
                activation=activation,
                transform=transform,
                left=_packed((layer.shape[0], rank), formats["branch_weight"]) if rank else None,
                right=right,
                branch_activation=formats["branch_activation"] if rank else None,
                requantize_intermediate=recipe.requantize_intermediate,
                bias_O=torch.empty(layer.shape[0], device="meta"),
            )
    return planned


def _transform(recipe: Recipe, width: int, shift: float) -> InputTransform:
    smooth, block = recipe.transform.smooth != "none", recipe.transform.hadamard
    block = math.gcd(width, block) if block else 0
    return InputTransform(
        smooth_I=torch.empty(width, device="meta") if smooth else None,
        signs_I=torch.empty(width, dtype=torch.int8, device="meta") if block else None,
        block=block,
        shift=shift,
    )


def _packed(shape: tuple[int, ...], fmt: Format) -> QuantizedTensor:
    tensors = {
        suffix: torch.empty(size, dtype=dtype, device="meta")
        for suffix, (size, dtype) in stored_shapes(shape, fmt).items()
    }
    return QuantizedTensor.from_tensors(tensors, shape, fmt)
