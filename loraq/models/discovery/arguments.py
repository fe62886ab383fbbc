"""Arguments of one forward of any transformer, from its signature and its configuration.

Latents come as images (B, C, H, W), videos (B, C, F, H, W) or (B, F, C, H, W), packed tokens
(B, N, C), audio (B, C, N), or lists of them; `layouts` says which are plausible, most likely first.
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
_PACKED = ("img_ids", "img_shapes", "num_frames", "shape_list", "video_coords")


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
    return list(dict.fromkeys([*likely, "image", "video", "frames", "packed", "audio"]))


def arguments(network: nn.Module, shape: InputShape, layout: str) -> dict[str, Any]:
    """Keyword arguments of `network.forward` with the latents in `layout`."""
    return _Arguments(network, shape, layout).found()


def _sides(patch: object) -> bool:
    return isinstance(patch, list | tuple)


class _Arguments:
    def __init__(self, network: nn.Module, shape: InputShape, layout: str) -> None:
        self.network, self.layout = network, layout
        self.config: Any = getattr(network, "config", {})
        self.images, self.tokens = shape.images, shape.tokens
        parameter = next(network.parameters())
        self.device = parameter.device
        self.dtype = getattr(network, "dtype", parameter.dtype)
        self.taken = inspect.signature(network.forward).parameters
        self.packing = 2 if {"img_ids", "img_shapes"} & {*self.taken} else 1
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
        }
        return self.ones(*sizes[self.layout])

    def text(self, *names: str) -> Tensor:
        return self.ones(self.images, self.tokens, self.first((*names, *_TEXT)))

    def mask(self) -> Tensor:
        kind = torch.bool if self.layout == "audio" else torch.int64  # as attention reads it
        return self.ones(self.images, self.tokens, dtype=kind)

    def ids(self, count: int) -> Tensor:
        axes = self.config.get("axes_dims_rope") or (0, 0, 0)
        return self.ones(count, len(axes))

    def times(self) -> Tensor:
        return torch.ones(self.images, device=self.device)

    def builders(self) -> dict[str, Callable[[], Any]]:
        """The values of arguments by name; those that are not here keep their defaults."""

        def pairs() -> Tensor:
            return self.ones(self.images, 2)

        times = self.times
        return {
            "hidden_states": self.latents,
            "x": self.latents,
            "timestep": times,
            "timesteps": times,
            "t": times,
            "timestep_r": times,
            "r_timestep": times,
            "guidance": lambda: times() if self.config.get("guidance_embeds") else None,
            "encoder_hidden_states": self.text,
            "encoder_hidden_states_t5": lambda: self.text("cross_attention_dim_t5"),
            "encoder_attention_mask": self.mask,
            "encoder_hidden_states_mask": self.mask,
            "encoder_mask": self.mask,
            "text_embedding_mask": self.mask,
            "text_embedding_mask_t5": self.mask,
            "pooled_projections": lambda: self.ones(
                self.images, self.first(("pooled_projection_dim", "in_text_dim2"))
            ),
            "img_ids": lambda: self.ids(math.prod(self.grid)),
            "txt_ids": lambda: self.ids(self.tokens),
            "img_shapes": lambda: [[(1, *self.grid)]] * self.images,
            "num_frames": lambda: 1,
            "height": lambda: self.grid[0],
            "width": lambda: self.grid[1],
            "added_cond_kwargs": lambda: {
                "resolution": pairs(),
                "aspect_ratio": self.ones(self.images, 1),
            },
            "original_size": pairs,
            "target_size": pairs,
            "crop_coords": pairs,
            "cap_feats": lambda: [
                self.ones(self.tokens, self.first(_TEXT)) for _ in range(self.images)
            ],
            "text_bth": self.text,
            "text_lens": lambda: torch.full((self.images,), self.tokens, device=self.device),
            "global_hidden_states": lambda: self.ones(
                self.images, 1, self.first(("global_states_input_dim", "global_cond_dim"))
            ),
            "class_labels": lambda: torch.zeros(self.images, dtype=torch.int64, device=self.device),
        }

    def found(self) -> dict[str, Any]:
        builders = self.builders()
        return {name: builders[name]() for name in self.taken if name in builders}
