"""LoRA on packed layers: what peft puts around a `QuantizedLinear`.

    y = packed(x) + scale · B·A·x      A and B in the model's 16-bit type, x not rounded

The packed tensors do not change: without the adapter the layer gives the same bits as before. peft
is optional: `diffusers_packed.py` imports this file where it is installed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners import lora
from torch import Tensor, nn

from loraq.errors import LoraqError
from loraq.layers.linear import QuantizedLinear
from loraq.models.adapters import FUSE_BEFORE, refuse_fusing
from loraq.models.denoisers import dtype_of

STARTS = (True, False, "gaussian")
"""`init_lora_weights` that do not read the weight, which a packed layer does not have."""


class AdaptedLinear(lora.Linear):
    """A packed layer with adapters; A and B are linear layers, or 1×1 convolutions for one."""

    base_layer: QuantizedLinear
    adapter_dtype: torch.dtype

    def __init__(self, *arguments: Any, adapter_dtype: torch.dtype, **settings: Any) -> None:
        self.adapter_dtype = adapter_dtype
        super().__init__(*arguments, **settings)

    @classmethod
    def of(cls, tuner: Any, adapter_dtype: torch.dtype) -> AdaptedLinear:
        """The tuner layer of a 16-bit layer as one of a packed layer, with its adapters."""
        adapted = cls.__new__(cls)
        own = {"adapter_dtype": adapter_dtype, "fan_in_fan_out": False}
        adapted.__dict__ = tuner.__dict__ | own
        return adapted

    def update_layer(self, adapter_name: str, *arguments: Any, **settings: Any) -> None:
        super().update_layer(adapter_name, *arguments, **settings)
        if self.get_base_layer().convolution:
            for matrices in (self.lora_A, self.lora_B):
                matrices[adapter_name] = _pointwise(matrices[adapter_name])

    def _get_in_out_features(self, module: QuantizedLinear) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(
        self, base_layer: QuantizedLinear
    ) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight_codes.device, self.adapter_dtype

    @property
    def weight(self) -> Tensor:
        """The packed codes: hot-swapping asks for the device of the weight, and nothing else."""
        return self.get_base_layer().weight_codes

    def merge(self, *_: Any, **__: Any) -> None:
        refuse_fusing()


class PackedLoraModel(lora.LoraModel):
    """peft's LoRA, which knows packed layers as well."""

    model: nn.Module

    def _prepare_model(self, peft_config: Any, model: Any) -> None:
        super()._prepare_model(peft_config, model)
        if any(isinstance(module, QuantizedLinear) for module in model.modules()):
            _refuse_variants(peft_config)
            if next(model.parameters(), None) is None:  # by which peft finds the device
                raise LoraqError(
                    f"This {type(model).__name__} has no parameters beside its packed layers, and "
                    "peft needs one. Add the adapter to the whole transformer, and name the layers "
                    "in target_modules (a list of names, or one regular expression)."
                )
            kind = functools.partial(AdaptedLinear, adapter_dtype=dtype_of(model))
            peft_config._register_custom_module({QuantizedLinear: kind})

    def _replace_module(self, parent: Any, child_name: str, new_module: Any, child: Any) -> None:
        if isinstance(new_module, AdaptedLinear):  # on its device already
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if any(isinstance(module, AdaptedLinear) for module in self.model.modules()):
            refuse_fusing()


def _refuse_variants(config: Any) -> None:
    """LoraqError for LoRA that computes something else, or starts from the layer's weights."""
    start, fields = config.init_lora_weights, dataclasses.fields(config)
    tagged = (field.name for field in fields if field.metadata.get("is_lora_variant"))
    if variant := next((name for name in ("use_dora", *tagged) if getattr(config, name)), None):
        reason = f"{variant} (a variant such as DoRA) computes more than scale · B·A·x"
    elif start not in STARTS:
        reason = f"init_lora_weights={start!r} reads or changes the weights of the layer"
    else:
        return
    raise LoraqError(
        f"This adapter cannot be added to packed layers: {reason}. Instead, {FUSE_BEFORE}"
    )


def _pointwise(linear: nn.Linear) -> nn.Conv2d:
    """A linear layer as 1×1 convolution."""
    out, width = linear.weight.shape
    convolution = nn.Conv2d(width, out, 1, bias=linear.bias is not None, device="meta")
    convolution.weight = nn.Parameter(linear.weight[..., None, None], linear.weight.requires_grad)
    convolution.bias = linear.bias
    return convolution


def _expand_lora_state_dict(
    loader: Any, transformer: Any, lora_state_dict: dict[str, Tensor]
) -> Any:
    """FLUX's loader widens matrices to the weights of their layers; of packed layers they fit."""
    packed = tuple(
        f"{loader.transformer_name}.{name.removesuffix('.base_layer')}.lora_"
        for name, module in transformer.named_modules()
        if isinstance(module, QuantizedLinear)
    )
    others = {k: v for k, v in lora_state_dict.items() if not k.startswith(packed)}
    return lora_state_dict | _EXPAND(loader, transformer, others)


_EXPAND = FluxLoraLoaderMixin._maybe_expand_lora_state_dict.__func__


def register() -> None:
    """Let peft and FLUX's loader take packed layers; what they do with others does not change."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = PackedLoraModel
    FluxLoraLoaderMixin._maybe_expand_lora_state_dict = classmethod(_expand_lora_state_dict)
