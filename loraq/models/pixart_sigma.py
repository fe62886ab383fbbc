"""PixArt-Σ: which linears of its transformer blocks are quantised, and what each one does.

Outside the blocks (patch embedding, timestep and caption projections, output) everything stays
in 16 bits; so do the cross-attention keys and values by default, as in SVDQuant.
"""

PIPELINE = "PixArtSigmaPipeline"
TRANSFORMER = "PixArtTransformer2DModel"
DEFAULT_SKIP = ("cross_k", "cross_v")

# (pattern of a layer's name below the transformer, role, input group relative to the block):
# layers with the same input group read the very same tensor.
ROLES = (
    (r"transformer_blocks\.\d+\.attn1\.to_q", "self_q", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_k", "self_k", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_v", "self_v", "attn1.qkv"),
    (r"transformer_blocks\.\d+\.attn1\.to_out\.0", "self_out", "attn1.out"),
    (r"transformer_blocks\.\d+\.attn2\.to_q", "cross_q", "attn2.q"),
    (r"transformer_blocks\.\d+\.attn2\.to_k", "cross_k", "attn2.kv"),
    (r"transformer_blocks\.\d+\.attn2\.to_v", "cross_v", "attn2.kv"),
    (r"transformer_blocks\.\d+\.attn2\.to_out\.0", "cross_out", "attn2.out"),
    (r"transformer_blocks\.\d+\.ff\.net\.0\.proj", "ff_up", "ff.up"),
    (r"transformer_blocks\.\d+\.ff\.net\.2", "ff_down", "ff.down"),
)
