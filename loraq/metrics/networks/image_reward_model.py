"""ImageReward's network (arXiv 2304.05977) with transformers' BLIP classes.

A BERT with cross-attention to the features of a ViT, and an MLP on its first token:
r = (head(h₀) − MEAN) / STD. The published package cannot be imported with current transformers; for
the comparison with it see `experiments/parity/image_reward/`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from loraq.errors import LoraqError

if TYPE_CHECKING:
    from PIL import Image

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of rewards, from the package
TOKENS = 35
HEAD = (1024, 128, 64, 16, 1)
PATCH, HEAD_WIDTH = 16, 64
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's pretraining
VISION_NAMES = (
    (r"^cls_token$", "embeddings.class_embedding"),
    (r"^pos_embed$", "embeddings.position_embedding"),
    (r"^patch_embed\.proj\.", "embeddings.patch_embedding."),
    (r"^norm\.", "post_layernorm."),
    (r"^blocks\.(\d+)\.norm(\d)\.", r"encoder.layers.\1.layer_norm\2."),
    (r"^blocks\.(\d+)\.attn\.qkv\.", r"encoder.layers.\1.self_attn.qkv."),
    (r"^blocks\.(\d+)\.attn\.proj\.", r"encoder.layers.\1.self_attn.projection."),
    (r"^blocks\.(\d+)\.mlp\.", r"encoder.layers.\1.mlp."),
)


class ImageRewardModel(nn.Module):
    """Rewards of (image, prompt) pairs; sizes are those of the state dict and med_config.json."""

    def __init__(self, vision: Any, text: Any) -> None:
        from transformers import BlipVisionModel
        from transformers.models.blip.modeling_blip_text import BlipTextModel

        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        widths = (text.hidden_size, *HEAD)
        maps = (nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.head = nn.Sequential(*maps)
        self.side = vision.image_size

    def forward(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """pixels [n, 3, side, side], ids and mask [n, 35] → rewards [n]."""
        image = self.vision(pixels).last_hidden_state
        hidden = self.text(
            ids,
            attention_mask=mask,
            encoder_hidden_states=image,
            encoder_attention_mask=torch.ones(
                image.shape[:2], dtype=torch.long, device=image.device
            ),
        ).last_hidden_state
        return (self.head(hidden[:, 0].float())[:, 0] - MEAN) / STD


def build_image_reward(
    state: Mapping[str, Tensor], med_config: Mapping[str, Any]
) -> ImageRewardModel:
    """The network with the package's weights; LoraqError for missing or unknown weights."""
    renamed = {}
    for name, tensor in state.items():
        if not name.startswith(UNUSED) and not name.endswith("position_ids"):
            renamed[_renamed(name)] = tensor
    vision, text = _configs(renamed, med_config)
    with torch.device("meta"):
        model = ImageRewardModel(vision, text)
    expected = {name: value.shape for name, value in model.named_parameters()}
    unmatched = sorted(
        name
        for name in set(expected) | set(renamed)
        if name not in expected or name not in renamed or expected[name] != renamed[name].shape
    )
    if unmatched:
        raise LoraqError(
            f"the state dict is not ImageReward's: {len(unmatched)} of {len(expected)} weights are "
            f"missing, unknown or of another shape ({', '.join(unmatched[:3])}). Download "
            "ImageReward.pt and med_config.json again."
        )
    model.load_state_dict(renamed, strict=False, assign=True)
    for module in model.modules():  # buffers that are not in the state dict
        if hasattr(module, "position_ids"):
            length = module.position_ids.shape[-1]
            module.register_buffer("position_ids", torch.arange(length)[None], persistent=False)
    return model.float().eval().requires_grad_(False)


def _renamed(name: str) -> str:
    if name.startswith("blip.visual_encoder."):
        inner = name.removeprefix("blip.visual_encoder.")
        for pattern, replacement in VISION_NAMES:
            inner = re.sub(pattern, replacement, inner)
        return f"vision.{inner}"
    if match := re.match(r"mlp\.layers\.(\d+)\.(weight|bias)$", name):
        # dropouts lie between the linear layers: 0, 2, 4, 6, 7
        return f"head.{(0, 2, 4, 6, 7).index(int(match[1]))}.{match[2]}"
    return name.replace("blip.text_encoder.", "text.", 1)


def _configs(state: Mapping[str, Tensor], med: Mapping[str, Any]) -> tuple[Any, Any]:
    """Configs of the ViT, from the shapes of its weights, and of the BERT, from med_config.json."""
    from transformers import BlipTextConfig, BlipVisionConfig

    try:
        positions = state["vision.embeddings.position_embedding"]
        width = positions.shape[-1]
        depth = 1 + max(int(n.split(".")[3]) for n in state if n.startswith("vision.encoder."))
        vision = BlipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=width // HEAD_WIDTH,
            image_size=PATCH * round((positions.shape[1] - 1) ** 0.5),
            patch_size=PATCH,
            layer_norm_eps=1e-6,
        )
        text = BlipTextConfig(
            encoder_hidden_size=width,
            is_decoder=True,  # adds cross-attention; the attention mask stays that of an encoder
            **{
                name: med[name]
                for name in (
                    "vocab_size",
                    "hidden_size",
                    "intermediate_size",
                    "num_hidden_layers",
                    "num_attention_heads",
                    "max_position_embeddings",
                    "layer_norm_eps",
                    "pad_token_id",
                    "hidden_act",
                )
            },
        )
    except (KeyError, ValueError, IndexError) as error:
        raise LoraqError(
            f"ImageReward's files do not fit ({type(error).__name__}: {error}). "
            "Download ImageReward.pt and med_config.json again."
        ) from None
    return vision, text


def preprocess(images: Sequence[Image.Image], side: int) -> Tensor:
    """The package's transform: bicubic resize of the shorter side, centre crop, normalisation."""
    from torchvision.transforms import v2
    from torchvision.transforms.functional import pil_to_tensor

    steps = v2.Compose(
        [v2.Resize(side, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(side)]
    )
    pixels = torch.stack([pil_to_tensor(steps(image)).float() / 255 for image in images])
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


def bert_tokenizer(vocabulary: str) -> Any:
    """bert-base-uncased's tokenizer from its vocab.txt, with the package's two extra tokens."""
    from transformers import BertTokenizer

    made = BertTokenizer(vocab=vocabulary, do_lower_case=True)
    made.add_special_tokens({"bos_token": "[DEC]", "additional_special_tokens": ["[ENC]"]})
    return made


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """ids and mask [n, 35]; longer prompts are truncated, as in training."""
    found = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=TOKENS,
        return_tensors="pt",
    )
    return found.input_ids, found.attention_mask
