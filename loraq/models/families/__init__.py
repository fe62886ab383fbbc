"""One file a model family: its layers' roles, its default skip list, what its weights tell.

Looked up by name (`models/family.py`); imports `models.moments` alone.
"""

MASKED_EMBEDDINGS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)
"""`EMBEDDINGS` of a family whose `encode_prompt` returns these, in order."""
