"""Methods of diffusers' models that packed layers cannot follow: refused by name, with the remedy.

They are attributes of one quantised model, over the methods of its class, which stay as they are.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NoReturn

from diffusers.utils import is_peft_available

from loraq.errors import LoraqError
from loraq.models.adapters import refuse_fusing


def refuse_projections(*_: Any, **__: Any) -> NoReturn:
    """In place of `fuse_qkv_projections`."""
    raise LoraqError(
        "fuse_qkv_projections() joins 16-bit weights, and packed layers have none. Leave it out: "
        "packed q, k and v share one quantised input already."
    )


def group_offload(network: Any, *arguments: Any, **settings: Any) -> None:
    """`enable_group_offload` of `network`'s class; LoraqError for settings that free no memory."""
    method = type(network).enable_group_offload
    bound = inspect.signature(method).bind(network, *arguments, **settings)
    bound.apply_defaults()
    given = bound.arguments
    for name, wanted in (
        ("offload_type", "block_level"),
        ("use_stream", False),
        ("offload_to_disk_path", None),
    ):
        if getattr(given[name], "value", given[name]) != wanted:
            raise LoraqError(
                f"{name}={given[name]!r} would leave the operands of packed layers on the device, "
                f"so that it frees no memory. Use {name}={wanted!r}."
            )
    method(*bound.args, **bound.kwargs)


def limit(network: Any) -> None:
    """Refuse what a packed `network` cannot do, and let peft add LoRA to its layers."""
    for name, refusal in (
        ("fuse_lora", refuse_fusing),
        ("fuse_qkv_projections", refuse_projections),
        ("enable_group_offload", functools.partial(group_offload, network)),
    ):
        if hasattr(type(network), name):
            setattr(network, name, refusal)
    if is_peft_available():
        from loraq.quantization.peft_layers import register

        register()


def unlimit(network: Any) -> None:
    """Undo `limit`; what peft knows stays."""
    for name in ("fuse_lora", "fuse_qkv_projections", "enable_group_offload"):
        network.__dict__.pop(name, None)
