"""What is found in published models from their configurations alone: layers, quantised share.

    python -m experiments.bench.models [--folder tests/published] [--output FILE.json]

Builds the denoisers of each folder without weights, and lists their layers.

Expected time: under a minute on 2 cores.
Outcome: results/bench/models.json, docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loraq.config import ModelConfig
from loraq.models import list_layers
from loraq.models.denoisers import parts
from loraq.models.files import read_json
from loraq.models.layers import family_of
from loraq.models.loading import meta_denoiser
from loraq.results import record
from loraq.utils.assets import CHECKOUT


def published_row(folder: Path) -> dict[str, Any]:
    """Counts of one model."""
    given = ("height", "width", "steps", "guidance", "max_sequence_length")
    model = ModelConfig(name=folder.name, path=str(folder), **dict.fromkeys(given))
    denoiser, source = meta_denoiser(model), json.loads((folder / "source.json").read_text())
    family = family_of(denoiser)
    layers = list_layers(denoiser, family)
    return {
        "name": folder.name,
        "hub_id": source["hub_id"],
        "pipeline": read_json(folder / "model_index.json")["_class_name"],
        "family": family,
        "denoisers": len(parts(denoiser)),
        "published_parameters": source["denoiser_parameters"],
        "parameters": sum(tensor.numel() for tensor in denoiser.state_dict().values()),
        "weights": sum(parameter.numel() for parameter in denoiser.parameters()),
        "quantizable": len(list_layers(denoiser, family, skip=())),
        "quantized": len(layers),
        "quantized_weights": sum(math.prod(layer.shape) for layer in layers),
        "roles": dict(Counter(layer.role for layer in layers)),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=CHECKOUT / "tests" / "published")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    rows = []
    for index in sorted(options.folder.glob("*/model_index.json")):
        row = published_row(index.parent)
        share = row["quantized_weights"] / row["weights"]
        print(f"{row['name']}: {row['quantized']} layers, {share:.1%} of the weights", flush=True)
        rows.append(row)
    if options.output is not None:
        record.save_findings({"rows": rows}, options.output)


if __name__ == "__main__":
    main()
