"""Load and save packed layers through diffusers: `from_pretrained`, `save_pretrained`.

`attach` registers the saved form of a quantised model. `loraq.diffusers_quantizer`, the module that
users import, adds quantising 16-bit weights on loading.
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
from loraq.models.adapters import base_layer, refuse_adapters, would_lose
from loraq.quantization.diffusers_config import QUANT_METHOD, PackedConfig
from loraq.quantization.facilities import limit, unlimit
from loraq.quantization.model_card import write_card_of_save


class PackedQuantizer(DiffusersQuantizer):
    """diffusers' quantizer for packed layers: loading, saving, `dequantize`."""

    quantization_config: PackedConfig
    use_keep_in_fp32_modules = True  # as without a quantizer: norms, embeddings of some classes

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        kwargs["pre_quantized"] = quantization_config.layers is not None
        super().__init__(quantization_config, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.quantization_config!r})"

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        if "disk" in devices:
            raise LoraqError(
                "device_map puts layers on disk, which packed LoRaQ layers do not support. Pass a "
                "device_map without 'disk'."
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if not self.pre_quantized:
            raise LoraqError(
                f"quantization_config holds no packed layers, but a method "
                f"({self.quantization_config.method}). Run `import loraq.diffusers_quantizer` "
                "first, which adds quantising while weights are loaded."
            )
        entries = self.quantization_config.layer_entries()
        for name, tensors in deserialize_layers(entries, expected_tensors(entries)).items():
            try:
                original: Any = model.get_submodule(name)
            except AttributeError:
                raise LoraqError(
                    f"quantization_config packs '{name}', which {type(model).__name__} does not "
                    "have. The checkpoint's config.json does not match its model: restore it."
                ) from None
            if original.weight.shape[:2] != tensors.weight.shape:
                raise LoraqError(
                    f"'{name}' is {tensors.weight.shape} in quantization_config and "
                    f"{tuple(original.weight.shape[:2])} in the model's configuration. The "
                    "checkpoint's config.json is inconsistent: restore it."
                )
            convolution = isinstance(original, nn.Conv2d)
            model.set_submodule(name, QuantizedLinear(tensors, convolution), strict=True)
        self._users = _layers_by_tensors(entries)

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """`missing_keys` without packed ones: shared tensors are stored under one layer only.

        Raises LoraqError if a stored tensor is missing.
        """
        entries = self.quantization_config.layer_entries()
        stored = {_buffer_name(name) for name in expected_tensors(entries)}
        refuse_missing(sorted(stored.intersection(missing_keys)))
        return [k for k in missing_keys if _packed_layer(model, k) is None]

    def check_if_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any
    ) -> bool:
        return _packed_layer(model, param_name) is not None

    def check_quantized_param_shape(self, name: str, current: Tensor, loaded: Tensor) -> None:
        raise LoraqError(
            f"'{name}' has shape {tuple(loaded.shape)} in the checkpoint and "
            f"{tuple(current.shape)} in quantization_config. The weights do not match config.json: "
            "restore the checkpoint's files."
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
        """Register a stored tensor in every layer that uses it.

        Reads it from `state_dict`, because `param_value` may have been cast.
        """
        layer, _, buffer = param_name.rpartition(".")
        stored, expected = state_dict[param_name], model.get_submodule(layer).get_buffer(buffer)
        if stored.dtype != expected.dtype:
            raise LoraqError(
                f"'{param_name}' is {stored.dtype} in the checkpoint and {expected.dtype} in "
                "quantization_config. The weights do not match config.json: restore the "
                "checkpoint's files."
            )
        placed = stored.to(target_device)
        for user in self._users.get(f"{layer}.{buffer.partition('_')[0]}", [layer]):
            model.get_submodule(user).register_buffer(buffer, placed)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        refuse_missing([name for name, held in model.state_dict().items() if held.is_meta])
        modules = []
        for name, tensors in held_layers(model, self.quantization_config.layer_entries()).items():
            modules.append(model.get_submodule(name))
            modules[-1].set_tensors(tensors)
        share_inputs(modules)
        limit(model)
        return model

    def get_state_dict_and_metadata(
        self, state_dict: Mapping[str, Tensor], safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every packed tensor once; views are cloned so that their base storage is not saved.

        diffusers calls this to save a model, so the model's card is written here. Raises LoraqError
        if an adapter is loaded, which the layout has no place for.
        """
        if adapted := next((name for name in state_dict if ".base_layer." in name), None):
            layer = adapted.partition(".base_layer.")[0]
            raise would_lose(layer, "which a packed checkpoint cannot hold")
        write_card_of_save()
        entries = self.quantization_config.layer_entries()
        stored = {_buffer_name(name) for name in expected_tensors(entries)}
        packed = tuple(f"{name}." for name in entries)
        kept = {}
        for name, tensor in state_dict.items():
            if not name.startswith(packed):
                kept[name] = tensor
            elif name in stored:
                owns_storage = tensor.untyped_storage().nbytes() == tensor.nbytes
                kept[name] = tensor if owns_storage else tensor.clone()
        return kept, {}

    def _dequantize(self, model: Any) -> Any:
        """Replace packed layers by 16-bit ones with the effective weights Ŵ.

        Their activations are no longer quantised.
        """
        refuse_adapters(model, "which dequantize() would remove")
        for name, tensors in held_layers(model, self.quantization_config.layer_entries()).items():
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


def register_quantizer() -> None:
    """Make packed models loadable by diffusers' `from_pretrained` (`quant_method` loraq)."""
    auto.AUTO_QUANTIZER_MAPPING.setdefault(QUANT_METHOD, PackedQuantizer)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(QUANT_METHOD, PackedConfig)


def attach(transformer: Any, layers: Mapping[str, LayerTensors], recipe: Recipe | None) -> None:
    """Mark a diffusers model as quantised, so that `save_pretrained` writes packed layers."""
    register_quantizer()
    config = PackedConfig.from_layers(layers, recipe)
    transformer.hf_quantizer = PackedQuantizer(config, pre_quantized=True)
    transformer.is_quantized, transformer.quantization_method = True, config.quant_method
    transformer.register_to_config(quantization_config=config)
    limit(transformer)


def forget(transformer: Any) -> None:
    """Undo `attach`."""
    unlimit(transformer)
    _drop_config(transformer)
    for name in ("hf_quantizer", "is_quantized", "quantization_method"):
        transformer.__dict__.pop(name, None)


def _drop_config(transformer: Any) -> None:
    kept = {k: v for k, v in transformer.config.items() if k != "quantization_config"}
    transformer._internal_dict = FrozenDict(kept)


def held_layers(model: nn.Module, entries: Mapping[str, Any]) -> dict[str, LayerTensors]:
    """The packed layers of `entries` over the buffers of `model`; shared operands stay shared."""
    found = {}
    for name in expected_tensors(entries):
        module, _, buffer = _buffer_name(name).rpartition(".")
        found[name] = base_layer(model, module).get_buffer(buffer)
    return deserialize_layers(entries, found)


def _buffer_name(name: str) -> str:
    """LAYER.OPERAND.SUFFIX (stored) → LAYER.OPERAND_SUFFIX (buffer); LAYER.bias is unchanged."""
    if name.endswith(".bias"):
        return name
    layer, operand, suffix = name.rsplit(".", 2)
    return f"{layer}.{operand}_{suffix}"


def refuse_missing(names: list[str]) -> None:
    """LoraqError if stored tensors are missing from the checkpoint or its configuration."""
    if names:
        raise LoraqError(
            f"The checkpoint has no tensor '{names[0]}'"
            + (f" ({len(names)} are missing)" if len(names) > 1 else "")
            + ", or its quantization_config does not name it. Restore its files."
        )


def _layers_by_tensors(entries: Mapping[str, Any]) -> dict[str, list[str]]:
    """LAYER.OPERAND, as stored → the layers that use these tensors."""
    found: dict[str, list[str]] = {}
    for name, entry in entries.items():
        for operand in (*OPERANDS, "transform"):
            if operand in entry:
                found.setdefault(entry[operand]["tensors"], []).append(name)
    return found


def _packed_layer(model: nn.Module, name: str) -> QuantizedLinear | None:
    """The packed layer that the tensor `name` belongs to; None if there is none."""
    try:
        module = model.get_submodule(name.rpartition(".")[0])
    except AttributeError:
        return None
    return module if isinstance(module, QuantizedLinear) else None
