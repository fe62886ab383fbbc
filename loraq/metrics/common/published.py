"""The published weights of metrics: repository, commit, and every file's size and sha256.

The sizes and sha256 of large files are those of the hub's Git LFS pointers. The sha256 of small
files and of Inception's were published by others who hashed these downloads, two for each or one
whose bytes could be composed again. So none is trusted on first download.
"""

from __future__ import annotations

from collections.abc import Collection

from loraq.errors import unknown
from loraq.metrics.common.weights import PublishedFile, Weights
from loraq.utils.assets import offline

INCEPTION = Weights(
    "inception-2015-12-05",
    ("fid", "frechet", "frechet_reference", "kid"),
    "LORAQ_INCEPTION_WEIGHTS",
    "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/",  # clean-fid's
    "",
    (
        PublishedFile(
            "inception-2015-12-05.pt",
            95_607_719,
            "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4",
        ),
    ),
    "inception",
)
CLIP = Weights(
    "clip-vit-large-patch14",
    ("clip_score", "clip_iqa"),
    "LORAQ_CLIP",
    "openai/clip-vit-large-patch14",
    "32bd64288804d66eefd0ccbe215aa642df71cc41",
    (
        PublishedFile(
            "config.json",
            4_519,
            "8a09b467700c58138c29d53c605b34ebc69beaadd13274a8a2af8ad2c2f4032a",
        ),
        PublishedFile(
            "merges.txt",
            524_619,
            "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a",
        ),
        PublishedFile(
            "model.safetensors",
            1_710_540_580,
            "a2bf730a0c7debf160f7a6b50b3aaf3703e7e88ac73de7a314903141db026dcb",
        ),
        PublishedFile(
            "preprocessor_config.json",
            316,
            "910e70b3956ac9879ebc90b22fb3bc8a75b6a0677814500101a4c072bd7857bd",
        ),
        PublishedFile(
            "special_tokens_map.json",
            389,
            "f8c0d6c39aee3f8431078ef6646567b0aba7f2246e9c54b8b99d55c22b707cbf",
        ),
        PublishedFile(
            "tokenizer.json",
            2_224_003,
            "a83e0809aa4c3af7208b2df632a7a69668c6d48775b3c3fe4e1b1199d1f8b8f4",
        ),
        PublishedFile(
            "tokenizer_config.json",
            905,
            "deef455e52fa5e8151e339add0582e4235f066009601360999d3a9cda83b1129",
        ),
        PublishedFile(
            "vocab.json",
            961_143,
            "3f0c4f7d2086b61b38487075278ea9ed04edb53a03cbb045b86c27190fa8fb69",
        ),
    ),
)
IMAGE_REWARD = Weights(
    "ImageReward",
    ("image_reward",),
    "LORAQ_IMAGE_REWARD",
    "zai-org/ImageReward",
    "5736be03b2652728fb87788c9797b0570450ab72",
    (
        PublishedFile(
            "ImageReward.pt",
            1_786_880_927,
            "d71dc8d4912bc633c06ab8ef1ef6a81e8199d4369f14b47b29baf1d19de561f6",
        ),
        PublishedFile(
            "med_config.json",
            485,
            "d8b5029cc3c0124313d17009d043f0701bbe497f3721fa4ceb818720fe665326",
        ),
    ),
)
PUBLISHED = (INCEPTION, CLIP, IMAGE_REWARD)
"""BERT's vocabulary (ImageReward) and the networks of LPIPS are in packages and in this one."""


def choose_weights(metrics: Collection[str]) -> list[Weights]:
    """The weights that these metrics need; LoraqError for a name that needs none."""
    known = {name for weights in PUBLISHED for name in weights.metrics}
    for name in metrics:
        if name not in known:
            raise unknown("metric with weights to download", name, known)
    return [weights for weights in PUBLISHED if set(weights.metrics) & set(metrics)]


def needed_weights(metrics: Collection[str], extractor: str) -> list[Weights]:
    """The weights that these metrics read with this feature extractor.

    With `auto`, Inception is used only if its variable names it.
    """
    return [
        weights
        for weights in PUBLISHED
        if set(weights.metrics) & set(metrics) and weights.extractor in ("", extractor)
    ]


def missing_weights(metrics: Collection[str], extractor: str) -> list[Weights]:
    """Those of the needed weights that are neither named by a variable nor in the cache."""
    return [weights for weights in needed_weights(metrics, extractor) if weights.missing()]


def check_reachable(metrics: Collection[str], extractor: str) -> None:
    """LoraqError if weights are missing and the environment is set to offline."""
    for weights in missing_weights(metrics, extractor) if offline() else ():
        weights.locate(f"offline (HF_HUB_OFFLINE): metric {weights.metrics[0]}")
