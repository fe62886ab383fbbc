"""Refuse transformers whose layers compute something else than their weights say.

A packed layer replaces a plain `nn.Linear` or 1×1 `nn.Conv2d`. Anything that is added to such a
layer (an adapter, a hook, a parametrisation), put around it (a compiled or sharded module) or used
in its place (fused projections, a second name) would be lost, or would run beside the packed layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraq.errors import LoraqError
from loraq.models.adapters import is_adapted

if TYPE_CHECKING:
    from torch import nn

WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Attributes in which PyTorch's wrappers hold the wrapped module."""
ADAPTED = "an adapter (LoRA), which quantising would leave out"
OFFLOADED = "hooks of an offloading or casting method, which a packed layer would not have"
COMPILED = "was compiled, and its compiled code would go on using the 16-bit layers"


def check_transformer(transformer: nn.Module) -> None:
    """Raise LoraqError if modules of the transformer are adapted, wrapped, compiled or fused."""
    for name, module in transformer.named_modules():
        where = f"'{name}'" if name else f"This {type(transformer).__name__}"
        if is_adapted(module):
            raise LoraqError(
                f"{where} has {ADAPTED}. Say what becomes of it: loraq.quantize(pipe, …, "
                "adapters='fuse') merges it into the weights, 'keep' leaves it in 16 bits beside "
                "the packed layers. Or remove it (pipe.unload_lora_weights(), merge_and_unload() "
                "or unload() of a PeftModel)."
            )
        if any(wrapper in module._modules for wrapper in WRAPPERS):
            raise LoraqError(
                f"{where} is wrapped in {type(module).__name__}, which hides its layers. Quantise "
                "the module inside, then wrap or compile the result."
            )
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise LoraqError(
                f"{where} {COMPILED}. Load the model again, quantise it, and compile the result."
            )
        if getattr(module, "fused_projections", False):
            raise LoraqError(
                f"{where} has fused projections, which run in place of its query, key and value "
                "layers. Call transformer.unfuse_qkv_projections() before quantising."
            )


def check_layers(transformer: nn.Module, names: Sequence[str]) -> None:
    """Raise LoraqError unless each named module is a plain linear layer or 1×1 convolution."""
    modules = {name: transformer.get_submodule(name) for name in names}
    for name, module in modules.items():
        if reason := _not_plain(module):
            raise LoraqError(
                f"'{name}' cannot be quantised: it {reason}. Load the plain 16-bit model, or skip "
                "the layer (quant.skip, or skip= of the recipe)."
            )
    _check_untied(transformer, modules)


def _not_plain(module: nn.Module) -> str | None:
    """What the module is instead of a plain layer with a 16- or 32-bit weight; None if it is one.

    A layer on the meta device is plain.
    """
    import torch
    from torch import nn

    kind, own = type(module), type(module).__name__
    if kind not in (nn.Linear, nn.Conv2d):
        return f"is a {own}, not a plain nn.Linear or 1×1 nn.Conv2d"
    if "forward" in vars(module) or hasattr(module, "_diffusers_hook"):
        return f"has {OFFLOADED} (enable it after quantising), or another forward() set on it"
    if module._forward_hooks or module._forward_pre_hooks:
        return "has forward hooks, which may change what it computes"
    weight = module._parameters.get("weight")
    if weight is None:
        return "computes its weight from other tensors (a parametrisation, weight norm or pruning)"
    if type(weight.data) is not torch.Tensor:
        return f"has a weight of type {type(weight.data).__name__}: it is quantised or sharded"
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"has a weight of {weight.dtype}, not of float32, bfloat16 or float16"
    if isinstance(module, nn.Conv2d) and not _is_pointwise(module):
        return f"is a convolution other than 1×1 ({module.extra_repr()})"
    return None


def _is_pointwise(module: nn.Conv2d) -> bool:
    ones, zeros = (1, 1), (0, 0)
    plain = module.kernel_size == module.stride == ones and module.groups == 1
    return plain and module.padding in (zeros, "valid")


def _check_untied(transformer: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Raise LoraqError if a layer, or its weight, is also used under another name."""
    users: dict[int, list[str]] = {}
    for name, module in transformer.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            users.setdefault(id(parameter), []).append(name)
    for name, module in modules.items():
        others = [user for user in users[id(module._parameters["weight"])] if user != name]
        if others:
            raise LoraqError(
                f"'{name}' and '{others[0]}' share one weight, and only the first would be "
                "replaced. Give each its own copy, or skip the layer (quant.skip)."
            )
