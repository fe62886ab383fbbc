"""Layer roles that several model families share.

`ROLES` of a family is a tuple of (regular expression for the layer's name, role, input group within
the block). Layers of one input group read the same tensor.
"""

from __future__ import annotations

ATTENTION_ROLES = (
    (r"transformer_blocks\.\d+\.attn1\.to_q", "self_q", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_k", "self_k", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_v", "self_v", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_out\.0", "self_out", "attn1.out"),
    (r"transformer_blocks\.\d+\.attn2\.to_q", "cross_q", "attn2.q"),
    (r"transformer_blocks\.\d+\.attn2\.to_k", "cross_k", "attn2.kv"),
    (r"transformer_blocks\.\d+\.attn2\.to_v", "cross_v", "attn2.kv"),
    (r"transformer_blocks\.\d+\.attn2\.to_out\.0", "cross_out", "attn2.out"),
)
"""`ROLES` of diffusers' self-attention `attn1` and cross-attention `attn2`."""
