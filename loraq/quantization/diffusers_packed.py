"""Load and save packed layers through diffusers: `from_pretrained`, `save_pretrained`.

`attach` tells a quantised model how it is saved. `loraq.diffusers_quantizer` adds quantising while
16-bit weights are loaded, and is what users import.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import FrozenDict
from diffusers.quantizers import auto
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from loraq.config import Recipe
from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.layers.serialization import deserialize_layers, expected_tensors
from loraq.layers.shared_input import share_inputs
from loraq.layers.tensors import OPERANDS, LayerTensors
from loraq.quantization.diffusers_config import NAME, PackedConfig


class PackedQuantizer(DiffusersQuantizer):
    """Loads packed layers, and saves them."""

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        kwargs["pre_quantized"] = quantization_config.layers is not None
        super().__init__(quantization_config, **kwargs)

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        places = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in places:
            raise LoraqError(
                "device_map puts layers on disk, which packed LoRaQ layers do not support. Give a "
                "device_map without 'disk'."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        entries = self.quantization_config.entries()
        for name, tensors in deserialize_layers(entries, expected_tensors(entries)).items():
            try:
                original: Any = model.get_submodule(name)
            except AttributeError:
                raise LoraqError(
                    f"quantization_config packs '{name}', which {type(model).__name__} does not "
                    "have. The checkpoint's config.json and its model do not belong together."
                ) from None
            if original.weight.shape[:2] != tensors.weight.shape:
                raise LoraqError(
                    f"quantization_config says that '{name}' is {tensors.weight.shape}, and "
                    f"the model's own configuration {tuple(original.weight.shape[:2])}. The "
                    "checkpoint's config.json is not whole: restore it."
                )
            convolution = isinstance(original, nn.Conv2d)
            model.set_submodule(name, QuantizedLinear(tensors, convolution), strict=True)
        self._readers = _readers(entries)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Without those that another layer's tensors stand for; LoraqError where one is gone."""
        stored = {_buffer(name) for name in expected_tensors(self.quantization_config.entries())}
        lost = sorted(stored.intersection(missing_keys))
        _refuse_missing(lost)
        return [k for k in missing_keys if _packed(model, k) is None]

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        return _packed(model, param_name) is not None

    def check_quantized_param_shape(self, name: str, current: Tensor, loaded: Tensor) -> None:
        raise LoraqError(
            f"'{name}' in the checkpoint is {tuple(loaded.shape)}, and quantization_config says "
            f"{tuple(current.shape)}. Its weights and its config.json do not belong together."
        )

    def create_quantized_param(
        self,
        model: Any,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        state_dict: Mapping[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """`state_dict` has the tensor as it is stored; `param_value` may have been cast."""
        layer, _, buffer = param_name.rpartition(".")
        stored, expected = state_dict[param_name], model.get_submodule(layer).get_buffer(buffer)
        if stored.dtype != expected.dtype:
            raise LoraqError(
                f"'{param_name}' in the checkpoint is {stored.dtype}, and quantization_config says "
                f"{expected.dtype}. Its weights and its config.json do not belong together."
            )
        placed = stored.to(target_device)
        for reader in self._readers.get(f"{layer}.{buffer.partition('_')[0]}", [layer]):
            model.get_submodule(reader).register_buffer(buffer, placed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        _refuse_missing([name for name, held in model.state_dict().items() if held.is_meta])
        modules = []
        for name, tensors in held_layers(model, self.quantization_config.entries()).items():
            modules.append(model.get_submodule(name))
            modules[-1].set_tensors(tensors)
        share_inputs(modules)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: Mapping[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every packed tensor once, without the rest of the storage that it is a part of."""
        entries = self.quantization_config.entries()
        stored = {_buffer(name) for name in expected_tensors(entries)}
        packed = tuple(f"{name}." for name in entries)
        kept = {}
        for name, tensor in state_dict.items():
            if not name.startswith(packed):
                kept[name] = tensor
            elif name in stored:
                whole = tensor.untyped_storage().nbytes() == tensor.nbytes
                kept[name] = tensor if whole else tensor.clone()
        return kept, {}

    def _dequantize(self, model: Any) -> Any:
        """Plain 16-bit layers with the effective weights (activations are no longer rounded)."""
        for name, tensors in held_layers(model, self.quantization_config.entries()).items():
            module = model.get_submodule(name)
            model.set_submodule(name, tensors.dequantized_module(module.convolution, model.dtype))
        _drop_config(model)
        del model.quantization_method
        return model

    @property
    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Make packed models loadable by diffusers' `from_pretrained` (`quant_method` loraq)."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault(NAME, PackedQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(NAME, PackedConfig)


def attach(transformer: Any, layers: Mapping[str, LayerTensors], recipe: Recipe | None) -> None:
    """Tell a diffusers model that it is quantised, so that `save_pretrained` writes it packed."""
    register()
    config = PackedConfig.of(layers, recipe)
    transformer.hf_quantizer = PackedQuantizer(config, pre_quantized=True)
    transformer.is_quantized, transformer.quantization_method = True, config.quant_method
    transformer.register_to_config(quantization_config=config)


def forget(transformer: Any) -> None:
    """Undo `attach`."""
    _drop_config(transformer)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        transformer.__dict__.pop(name, None)


def _drop_config(transformer: Any) -> None:
    kept = {k: v for k, v in transformer.config.items() if k != "quantization_config"}
    transformer._internal_dict = FrozenDict(kept)


def held_layers(model: nn.Module, entries: Mapping[str, Any]) -> dict[str, LayerTensors]:
    """The layers of these entries over the buffers of `model`, shared ones as one object."""
    found = {}
    for name in expected_tensors(entries):
        module, _, buffer = _buffer(name).rpartition(".")
        found[name] = model.get_submodule(module).get_buffer(buffer)
    return deserialize_layers(entries, found)


def _buffer(name: str) -> str:
    """LAYER.OPERAND.SUFFIX of the layout as the buffer LAYER.OPERAND_SUFFIX; LAYER.bias stays."""
    if name.endswith(".bias"):
        return name
    layer, operand, suffix = name.rsplit(".", 2)
    return f"{layer}.{operand}_{suffix}"


def _refuse_missing(names: list[str]) -> None:
    """LoraqError where a checkpoint lacks tensors, or its configuration does not name a layer's."""
    if names:
        raise LoraqError(
            f"The checkpoint has no tensor '{names[0]}'"
            + (f" ({len(names)} are missing)" if len(names) > 1 else "")
            + ", or its quantization_config does not speak of it. Restore its files."
        )


def _readers(entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """OWNER.OPERAND -> the layers that compute with these tensors."""
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for operand in (*OPERANDS, "transform"):
            if operand in entry:
                found.setdefault(entry[operand]["tensors"], []).append(name)
    return found


def _packed(model: nn.Module, name: str) -> QuantizedLinear | None:
    """The quantised layer that a tensor of this name belongs to."""
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
    return module if isinstance(module, QuantizedLinear) else None
