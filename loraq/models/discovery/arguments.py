"""Arguments of one forward of any transformer, from its signature and its configuration.

Latents come as images (B, C, H, W), videos (B, C, F, H, W), (B, F, C, H, W) or (B, F, H, W, C),
packed tokens (B, N, C), audio (B, C, N), or a list of videos; `layouts` says which are plausible,
most likely first.
All values are 1.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

TOKENS = 2
_CHANNELS = (
    "in_channels",
    "in_visual_dim",
    "io_channels",
    "latent_dim",
    "in_dim",
    "latent_channel",
)
_TEXT = (
    "joint_attention_dim", "caption_channels", "text_dim", "text_embed_dim", "cap_feat_dim",
    "context_in_dim", "in_text_dim", "text_in_dim", "cross_attention_input_dim", "cond_token_dim",
    "text_hidden_dim", "encoder_hidden_size", "llm_features_dim", "dit_text_dim",
    "cross_attention_dim", "condition_dim",
)  # fmt: skip
"""Names in configurations of the width of a text embedding, the most telling first."""
LAYOUTS = ("image", "video", "frames", "packed", "audio", "channels last")
_PACKED = ("img_ids", "img_shapes", "num_frames", "shape_list", "segment_ids")


@dataclass(frozen=True)
class InputShape:
    """Images of the batch, side of the square latents (None: two patches), tokens of a prompt."""

    images: int = 1
    side: int | None = None
    tokens: int = TOKENS


def layouts(network: nn.Module) -> list[str]:
    """The plausible layouts of the latents, most likely first."""
    config: Any = getattr(network, "config", {})
    taken = inspect.signature(network.forward).parameters
    patch, name = config.get("patch_size"), type(network).__name__
    video = "3D" in name or "patch_size_t" in config or (_sides(patch) and len(patch) > 2)
    likely = ["video", "frames"] if video else ["image"]
    if "1D" in name or "Audio" in name:
        likely = ["audio", "packed"]
    if any(argument in taken for argument in _PACKED):
        likely = ["packed", *likely]
    if any("list" in str(p.annotation).lower() for p in list(taken.values())[:1]):
        likely = ["listed", *likely]
    return list(dict.fromkeys([*likely, *LAYOUTS]))


def side_of(network: nn.Module, shape: InputShape, layout: str) -> int:
    """The side of the square latents of `arguments`."""
    return _Arguments(network, shape, layout).side


def arguments(network: nn.Module, shape: InputShape, layout: str) -> dict[str, Any]:
    """Keyword arguments of `network.forward` with the latents in `layout`."""
    return _Arguments(network, shape, layout).found()


def _sides(patch: object) -> bool:
    return isinstance(patch, list | tuple)


class _Arguments:
    def __init__(self, network: nn.Module, shape: InputShape, layout: str) -> None:
        self.network, self.layout = network, layout
        self.config: Any = getattr(network, "config", {})
        self.images = shape.images
        fixed = self.config.get("text_len")
        if not self.config.get("use_rotary_positional_embeddings", True):
            fixed = self.config.get("max_text_seq_length")
        self.tokens = fixed or shape.tokens
        parameter = next(network.parameters())
        self.device = parameter.device
        self.dtype = getattr(network, "dtype", parameter.dtype)
        self.taken = inspect.signature(network.forward).parameters
        packed = layout == "packed" and "num_frames" not in self.taken
        self.packing = 2 if packed else 1
        self.side = shape.side or 2 * max(self.patch, self.packing)
        grid = self.side // self.packing
        self.grid = (grid, grid)

    @property
    def patch(self) -> int:
        patch: Any = self.config.get("patch_size") or self.config.get("all_patch_size") or 1
        return int(max(patch)) if _sides(patch) else int(patch)

    def first(self, names: Sequence[str], default: int = 16) -> int:
        """The first of the settings that the configuration has."""
        for name in names:
            value = self.config.get(name)
            if isinstance(value, list | tuple) and value:
                value = value[0]
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return default

    def ones(self, *size: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.ones(*size, device=self.device, dtype=dtype or self.dtype)

    def latents(self) -> Any:
        channels, side = self.first(_CHANNELS), self.side
        n = self.images
        if self.layout == "listed":
            return [self.ones(channels, 1, side, side) for _ in range(n)]
        sizes = {
            "image": (n, channels, side, side),
            "video": (n, channels, 1, side, side),
            "frames": (n, 1, channels, side, side),
            "packed": (n, math.prod(self.grid), channels),
            "audio": (n, channels, side * side),
            "channels last": (n, 1, side, side, channels),
        }
        return self.ones(*sizes[self.layout])

    def text(self, *names: str) -> Tensor:
        layers = self.config.get("num_text_layers")
        size = [self.images, self.tokens, *([layers] if layers else [])]
        return self.ones(*size, self.first((*names, *_TEXT)))

    def mask(self) -> Tensor:
        return self.ones(self.images, self.tokens, dtype=torch.bool)

    def ids(self, count: int) -> Tensor:
        axes = self.config.get("axes_dims_rope") or (0, 0, 0)
        return self.ones(count, len(axes))

    def times(self) -> Tensor:
        frames = [1] if "r_timestep" in self.taken else []
        return torch.ones(self.images, *frames, device=self.device)

    def pairs(self) -> Tensor:
        return self.ones(self.images, 2)

    def zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=torch.int64, device=self.device)

    def wide(self, *names: str, tokens: int | None = None) -> Tensor | None:
        """Tokens of a width that the configuration sets; None if it does not."""
        width = self.first(names, 0)
        return self.ones(self.images, tokens or self.tokens, width) if width else None

    def builders(self) -> dict[str, Callable[[], Any]]:
        """The values of arguments by name; None: the default of the forward."""
        n, count, text, times = self.images, math.prod(self.grid), self.text, self.times
        flat = "segment_ids" in self.taken
        values: dict[str, Callable[[], Any]] = dict.fromkeys(
            ("timestep", "timesteps", "t", "audio_timestep", "sigma"), times
        )
        values |= dict.fromkeys(("original_size", "target_size", "crop_coords"), self.pairs)
        masks = ("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask")
        values |= dict.fromkeys((*masks, "audio_encoder_attention_mask"), self.mask)
        values["text_embedding_mask"] = self.mask
        return values | {
            "hidden_states": self.latents,
            "x": self.latents,
            "r_timestep": times,
            "timestep_r": lambda: times() if self.required("timestep_r") else None,
            "guidance": lambda: times() if self.config.get("guidance_embeds") else None,
            "encoder_hidden_states": lambda: self.wide(*_TEXT, tokens=count) if flat else text(),
            "encoder_hidden_states_t5": lambda: self.wide(
                "cross_attention_dim_t5",
                "text_embed_dim_t5",
                "caption_channels",
                tokens=self.config.get("text_len_t5"),
            ),
            "encoder_hidden_states_llama3": lambda: self.ones(
                1 + max(self.config.get("llama_layers") or [0]), n, self.tokens, self.first(_TEXT)
            ),
            "encoder_hidden_states_2": lambda: self.wide("text_embed_2_dim"),
            "encoder_attention_mask_2": lambda: (
                self.mask() if self.config.get("text_embed_2_dim") else None
            ),
            "encoder_hidden_states_image": lambda: self.wide("image_dim", tokens=257),
            "text_embedding_mask_t5": lambda: self.ones(n, self.first(("text_len_t5",))),
            "image_embeds": lambda: self.wide("image_embed_dim", "image_proj_dim"),
            "text_encoder_layers": lambda: [
                self.wide("text_encoder_dim")
                for _ in range(self.first(("num_layers",)) + self.first(("num_single_layers",)))
            ],
            "pooled_projections": lambda: self.ones(
                n, self.first(("pooled_projection_dim", "in_text_dim2"))
            ),
            "pooled_embeds": lambda: self.ones(n, self.first(("text_emb_dim",))),
            "img_ids": lambda: None if self.layout == "image" else self.ids(count),
            "txt_ids": lambda: self.ids(self.tokens),
            "img_shapes": lambda: [[(1, *self.grid)]] * n,
            "img_mask": lambda: torch.arange(self.tokens + count // 4).ge(self.tokens)[None],
            "position_ids": lambda: self.zeros(
                *((n, count) if flat else (self.tokens + count,)), 3
            ),
            "segment_ids": lambda: self.zeros(n, count),
            "indicator": lambda: self.zeros(n, count) + 2,
            "num_frames": lambda: 1,
            "height": lambda: self.grid[0],
            "width": lambda: self.grid[1],
            "audio_num_frames": lambda: 1,
            "audio_hidden_states": lambda: self.wide("audio_in_channels", "in_audio_dim", tokens=1),
            "audio_encoder_hidden_states": lambda: self.wide(
                "audio_caption_channels", "caption_channels", "audio_cross_attention_dim"
            ),
            "added_cond_kwargs": lambda: {
                "resolution": self.pairs(),
                "aspect_ratio": self.ones(n, 1),
            },
            "image_meta_size": lambda: self.ones(n * 6),
            "style": lambda: self.zeros(n),
            "class_labels": lambda: self.zeros(n),
            "prior_token_id": lambda: self.zeros(n, (self.side // self.patch) ** 2),
            "prior_token_drop": lambda: self.zeros(n, (self.side // self.patch) ** 2).bool(),
            "padding_mask": lambda: self.ones(1, 1, self.side, self.side),
            "control_hidden_states": lambda: self.ones(
                n, self.first(("vace_in_channels",)), 1, self.side, self.side
            ),
            "context_latents": lambda: self.ones(
                n, count, self.first(("in_channels",)) - self.first(_CHANNELS)
            ),
            "cap_feats": lambda: [self.ones(self.tokens, self.first(_TEXT)) for _ in range(n)],
            "text_bth": text,
            "text_lens": lambda: self.zeros(n) + self.tokens,
            "global_hidden_states": lambda: (
                self.wide("global_states_input_dim", tokens=1)
                if "global_states_input_dim" in self.config
                else self.ones(n, self.first(("global_cond_dim",)))
            ),
            "local_add_cond": lambda: None,
            "visual_rope_pos": lambda: [
                torch.arange(size, device=self.device)
                for size in (1, self.side // self.patch, self.side // self.patch)
            ],
            "text_rope_pos": lambda: torch.arange(self.tokens, device=self.device),
            "proj_embedding": lambda: self.ones(n, self.first(("embedding_dim",))),
            "rotary_embedding": lambda: self.rotary(count + 1),
            "image_rotary_emb": lambda: (
                self.rotary(count) if self.config.get("use_rotary_positional_embeddings") else None
            ),
            "chunk_partition": lambda: [1],
        }

    def rotary(self, count: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of rotary positions."""
        width = self.first(("attention_head_dim",))
        if "rotary_embedding" in self.taken:  # of half the channels
            width //= 2
        return self.ones(count, width), self.ones(count, width)

    def required(self, name: str) -> bool:
        return self.taken[name].default is inspect.Parameter.empty

    def found(self) -> dict[str, Any]:
        builders = self.builders()
        made = {name: builders[name]() for name in self.taken if name in builders}
        return {name: value for name, value in made.items() if value is not None}
