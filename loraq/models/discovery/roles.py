"""What a layer does, by its name inside the block: the field's usual names.

The last part of a name says which projection it is (`to_q`, `net.0.proj`, `linear_in`), the parts
before it where it stands (`attn2`, `ff_context`, `norm1`). A layer of an unknown name has the name
itself as its role, with underscores for dots.
"""

from __future__ import annotations

import re
from collections.abc import Collection

MODULATION = re.compile(r"(^|[._])(ada_?ln\w*|mod|modulation|film|norm\w*)\.", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|(^|[._])(time|text|caption)_proj", re.IGNORECASE)
CROSS_INPUTS = re.compile(r"(\w+_)?cross_(k|v|kv)")
"""Roles of keys and values of another sequence, which SVDQuant leaves in 16 bits."""

_CONTEXT = re.compile(r"(^|[._])(context|txt|text|add)(_|\.|$)|_t(\.|$)")
_ATTENTION = re.compile(r"attn|attention|(^|\.)mha\.")
_CROSS = re.compile(r"attn2|cross")
_FEED_FORWARD = re.compile(r"(^|[._])(ffn?|feed_?forward|mlp|moe|shared_experts|experts)([._]|$)")

_ATTENTION_PARTS = (
    (r"(to_|w)?q(uery)?(_proj|_linear|_t)?|add_q_proj", "q"),
    (r"(to_|w)?k(ey)?(_proj|_linear|_t)?|add_k_proj", "k"),
    (r"(to_|w)?v(alue)?(_proj|_linear|_t)?|add_v_proj", "v"),
    (r"(\w+_)?kv(_proj|_linear)?", "kv"),
    (r"(\w+_)?qkv(_proj|_linear)?", "qkv"),
    (r"to_out(\.0|_t)?|to_add_out|out_proj|out_layer|o_proj|wo|(\w+_attn_)?proj", "out"),
)
_FEED_FORWARD_PARTS = (
    (r"(.+\.)?(net\.0\.proj|conv_inverted|inverted_conv\.conv)", "up"),
    (r"(.+\.)?(net\.2|conv_point|point_conv\.conv)", "down"),
    (r"(.+\.)?(gate|gate_proj|gate_layer|w1)", "gate"),
    (
        r"(.+\.)?(up|up_proj|linear_in|proj_in|in_layer|proj|fc1|linear_fc1|ff_in|gate_up_proj|w3|0)",
        "up",
    ),
    (
        r"(.+\.)?(down|down_proj|linear_out|proj_out|out_layer|out|out_projection|fc2|linear_fc2"
        r"|ff_out|w2|2|3)",
        "down",
    ),
)
_BARE = re.compile(r"(gate|up|down)_proj|ff_(in|out)")
"""Parts of a feed-forward that stand in the block itself."""


def role_of(inside: str, siblings: Collection[str]) -> str:
    """The role of the layer `inside` a block that has the layers `siblings`."""
    context = "context_" if _CONTEXT.search(inside) else ""
    container, _, last = inside.rpartition(".")
    if MODULATION.search(inside) or re.search(r"_mod(\.|$)|modulation$", inside):
        return f"{context}modulation"
    if last == "to_qkv_mlp_proj":
        return "single_in"
    if f"{container}.to_qkv_mlp_proj" in siblings and re.fullmatch(r"to_out(\.0)?", last):
        return "single_out"
    if "proj_mlp" in siblings and inside in ("proj_mlp", "proj_out"):
        return "ff_up" if inside == "proj_mlp" else "single_out"
    if part := _attention_part(inside):
        return _attention_role(inside, part, context, siblings)
    if (_FEED_FORWARD.search(container) or _BARE.fullmatch(inside)) and (
        part := _feed_forward_part(inside, siblings)
    ):
        return f"{context}ff_{part}"
    return re.sub(r"\W+", "_", inside).lower()


def _attention_part(inside: str) -> str | None:
    """q, k, v, kv, qkv or out of an attention; None for another layer."""
    found = re.search(r"(?P<where>.*?)\.(?P<last>[^.]+(\.0)?)$", inside)
    if found is None or not _ATTENTION.search(found["where"]):
        return None
    for pattern, part in _ATTENTION_PARTS:
        if re.fullmatch(pattern, found["last"]):
            return part
    return None


def _attention_role(inside: str, part: str, context: str, siblings: Collection[str]) -> str:
    if part in ("k", "v", "kv") and context and not _reads_queries(inside, siblings):
        return f"context_cross_{part}"
    if context:
        return f"context_{part}"
    return f"cross_{part}" if _CROSS.search(inside) else f"self_{part}"


def _reads_queries(inside: str, siblings: Collection[str]) -> bool:
    """Whether the text stream of the attention has queries of its own: joint attention."""
    where = inside.rpartition(".")[0]
    return any(
        other.startswith(where)
        and _CONTEXT.search(other)
        and _attention_part(other) in ("q", "qkv")
        for other in siblings
    )


def _feed_forward_part(inside: str, siblings: Collection[str]) -> str | None:
    """gate, up or down of a feed-forward; None for another layer."""
    container, _, last = inside.rpartition(".")
    if last == "linear_1":  # silu(linear_1) · another
        return "gate"
    if last in ("linear_2", "linear_3"):
        is_down = last == "linear_2" and f"{container}.out_projection" not in siblings
        return "down" if is_down else "up"
    for pattern, part in _FEED_FORWARD_PARTS:
        if re.fullmatch(pattern, inside):
            return part
    return None
