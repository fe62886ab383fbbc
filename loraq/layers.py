"""A quantised layer: its packed tensors (`LayerTensors`) and the module that computes with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from loraq.formats import Format, QuantizedTensor, dequantize
from loraq.forward import QuantizedInput, multiply, quantize_input, quantized_linear
from loraq.transforms import InputTransform

RANK_MULTIPLE = 16
OPERANDS = ("weight", "left", "right")


@dataclass(frozen=True)
class LayerTensors:
    """Everything one layer stores. `right` may be the very object another layer holds (q/k/v)."""

    weight: QuantizedTensor
    activation: Format
    transform: InputTransform = field(default_factory=InputTransform)
    left: QuantizedTensor | None = None
    right: QuantizedTensor | None = None
    branch_activation: Format | None = None
    requantize_intermediate: bool = True
    bias_O: Tensor | None = None

    def effective_weight(self) -> Tensor:
        """Ŵ = Wq + L·R back in the original basis, float32 (O, I)."""
        w_OI = dequantize(self.weight)
        if self.left is not None and self.right is not None:
            w_OI = w_OI + dequantize(self.left) @ dequantize(self.right)
        return self.transform.weight_back(w_OI)

    def forward(self, x: Tensor) -> Tensor:
        """The equation on this layer, dequantised afresh: slow, exact, without a module."""
        return quantized_linear(self.transform.input(x.float()), bias_O=self.bias_O, **self.dense())

    def plain(self, convolution: bool, dtype: torch.dtype) -> nn.Module:
        """An ordinary layer with the weight Ŵ; its bias takes the transform's shift back."""
        weight_OI, bias_O = self.effective_weight(), self.bias_O
        out, width = weight_OI.shape
        layer: nn.Module = nn.Linear(width, out, bias=bias_O is not None)
        if convolution:
            layer = nn.Conv2d(width, out, 1, bias=bias_O is not None)
        values = {"weight": weight_OI[..., None, None] if convolution else weight_OI}
        if bias_O is not None:
            values["bias"] = bias_O + self.transform.shift * weight_OI.double().sum(-1).float()
        layer.load_state_dict(values)
        return layer.to(weight_OI.device, dtype).requires_grad_(False)

    def dense(self) -> dict:
        """The arguments of `quantized_linear` with weights dequantised to float32.

        The rank is filled up with zeros, which change no value: narrow products are slow otherwise.
        """
        right_RI = left_OR = None
        if self.right is not None and self.left is not None:
            right_RI, left_OR = dequantize(self.right), dequantize(self.left)
            filling = -right_RI.shape[0] % RANK_MULTIPLE
            right_RI, left_OR = pad(right_RI, (0, 0, 0, filling)), pad(left_OR, (0, filling))
        return {
            "weight_OI": dequantize(self.weight),
            "activation": self.activation,
            "right_RI": right_RI,
            "left_OR": left_OR,
            "branch_activation": self.branch_activation,
            "requantize_intermediate": self.requantize_intermediate,
        }


class SharedInput:
    """The quantised input that q, k and v read: made for the first, forgotten after the last.

    They are known to read one x where they are called with the very same tensor, once each.
    Autograd counts changes in place; inference tensors have no such count, and must not be changed
    between the calls of q, k and v (diffusers' attention processors do not).
    """

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._state: tuple[Tensor, int | None, QuantizedInput, set[int]] | None = None
        self._moved: dict[int, tuple[Tensor, Tensor]] = {}
        self._moves = 0

    def of(self, reader: object, x: Tensor, made: Callable[[], QuantizedInput]) -> QuantizedInput:
        """What `made` gives for x, made once for all readers."""
        if torch.compiler.is_compiling():
            return made()
        version = None if x.is_inference() else x._version
        state = self._state
        if state is None or state[0] is not x or state[1] != version or id(reader) in state[3]:
            state = (x, version, made(), set())
        state[3].add(id(reader))
        self._state = None if len(state[3]) == self.readers else state
        return state[2]

    def move(self, tensors: Sequence[Tensor], fn: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """`fn` of each tensor, one result for a tensor that several readers hold."""
        for tensor in tensors:
            if id(tensor) not in self._moved:
                self._moved[id(tensor)] = tensor, fn(tensor)
        found = [self._moved[id(tensor)][1] for tensor in tensors]
        self._moves += 1
        if self._moves == self.readers:
            self._moved, self._moves = {}, 0
        return found


def share_inputs(modules: Sequence[QuantizedLinear]) -> None:
    """Let layers whose stored transform and R are one object quantise their input once."""
    alike: dict[tuple, list[QuantizedLinear]] = {}
    for module in modules:
        t = module.tensors
        formats = t.activation, t.branch_activation, t.requantize_intermediate
        alike.setdefault((id(t.transform), id(t.right), formats), []).append(module)
    for readers in alike.values():
        shared = SharedInput(len(readers)) if len(readers) > 1 else None
        for module in readers:
            module.shared = shared


class QuantizedLinear(nn.Module):
    """Stands in for `nn.Linear` or a 1×1 `nn.Conv2d`; buffers are the packed tensors.

    Buffers are called OPERAND_SUFFIX, as docs/checkpoints.md says. The dequantised weights that
    emulation multiplies with are a cache made at first use in the input's dtype; they are no
    buffers, and neither saved nor pickled.
    """

    def __init__(self, tensors: LayerTensors, convolution: bool = False) -> None:
        super().__init__()
        self.convolution = convolution
        self.shared: SharedInput | None = None
        self.out_features, self.in_features = tensors.weight.shape
        self.hold(tensors)

    def hold(self, tensors: LayerTensors) -> None:
        """Compute with `tensors` from now on."""
        self.tensors = tensors
        for part in OPERANDS:
            packed = getattr(tensors, part)
            for suffix, tensor in ({} if packed is None else packed.tensors()).items():
                self.register_buffer(f"{part}_{suffix}", tensor)
        for suffix, tensor in tensors.transform.tensors().items():
            self.register_buffer(f"transform_{suffix}", tensor)
        self.register_buffer("bias", tensors.bias_O)
        self._cache: tuple[torch.dtype, torch.device, dict, InputTransform] | None = None

    def _apply(self, fn, recurse=True):
        """Devices change, types never do: packed tensors are what they are in any model's dtype."""

        def moved(tensor: Tensor) -> Tensor:
            other = fn(tensor)
            return other if other.dtype == tensor.dtype else tensor.to(other.device)

        names = [name for name, tensor in self._buffers.items() if tensor is not None]
        held = [self.get_buffer(name) for name in names]
        moves = [moved(t) for t in held] if self.shared is None else self.shared.move(held, moved)
        for name, tensor in zip(names, moves, strict=True):
            self.register_buffer(name, tensor)
        self._read_buffers()
        return self

    def _load_from_state_dict(self, *arguments):
        super()._load_from_state_dict(*arguments)
        self._read_buffers()

    def __getstate__(self):
        return self.__dict__ | {"_cache": None}

    def _read_buffers(self) -> None:
        """Compute with the buffers as they are now."""
        held = dict(self.named_buffers())
        operands = {
            part: QuantizedTensor.from_tensors(_named(held, part), packed.shape, packed.format)
            for part in OPERANDS
            if (packed := getattr(self.tensors, part)) is not None
        }
        old = self.tensors.transform
        transform = InputTransform.from_tensors(
            _named(held, "transform"), self.in_features, old.block, old.shift
        )
        self.tensors = replace(
            self.tensors, **operands, transform=transform, bias_O=held.get("bias")
        )
        self._cache = None

    def forward(self, x: Tensor) -> Tensor:
        dense, transform, bias_O = self._dense(x.dtype, x.device)

        def made() -> QuantizedInput:
            transformed = transform.input(x.movedim(1, -1) if self.convolution else x)
            return quantize_input(
                transformed,
                x.dtype,
                dense["activation"],
                dense["right_RI"],
                dense["branch_activation"],
                dense["requantize_intermediate"],
            )

        held = made() if self.shared is None else self.shared.of(self, x, made)
        y = multiply(held, dense["weight_OI"], dense["left_OR"], bias_O).to(x.dtype)
        return y.movedim(-1, 1) if self.convolution else y

    def _dense(self, dtype: torch.dtype, device: torch.device):
        if self._cache is None or self._cache[:2] != (dtype, device):
            dense = {
                name: value.to(device, dtype) if isinstance(value, Tensor) else value
                for name, value in self.tensors.dense().items()
            }
            t = self.tensors.transform
            moved = replace(
                t,
                smooth_I=None if t.smooth_I is None else t.smooth_I.to(device, dtype),
                signs_I=None if t.signs_I is None else t.signs_I.to(device),
            )
            bias = self.tensors.bias_O
            dense_bias = None if bias is None else bias.to(device, dtype)
            self._cache = (dtype, device, {"dense": dense, "bias": dense_bias}, moved)
        held = self._cache[2]
        return held["dense"], self._cache[3], held["bias"]

    def extra_repr(self) -> str:
        t = self.tensors
        rank = 0 if t.left is None else t.left.shape[-1]
        return (
            f"in={self.in_features}, out={self.out_features}, weight={t.weight.format.label}, "
            f"activation={t.activation.label}, rank={rank}"
        )


def _named(buffers: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    """The buffers called PART_SUFFIX, by suffix."""
    start = f"{part}_"
    return {n.removeprefix(start): t for n, t in buffers.items() if n.startswith(start)}
