"""Write a trained model's card and its `conf/model` file from what its training recorded.

    python -m experiments.train_tiny.card --model tiny_flux

Read are the settings, the pipeline's configurations, and of the folder `record/`: the training
(export.py), weights table (inspect_weights.py), scores (evaluate.py), and NAME_seen.md, what
somebody saw in the grid, if it exists. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraq.models.files import components
from loraq.utils.files import write_text

from . import model
from .settings import ASSETS, MODELS, RECORD, ROOT, Settings

FAMILIES = {"tiny_pixart": "pixart_sigma", "tiny_sana": "sana"}
TITLES = {"tiny_pixart": "PixArt-Σ", "tiny_sana": "SANA", "tiny_flux": "FLUX.1"}
COUNTS = ("no", "one", "two", "three", "four", "five", "six")


def arguments(settings: Settings) -> dict[str, Any]:
    """Return the call's arguments for one prompt, beside size, steps and length of the prompt."""
    call = model.networks(settings).arguments(settings.guidance, 1)
    return {k: v[0] if isinstance(v, list) else v for k, v in call.items()}


def blocks(settings: Settings) -> str:
    """Return the number of blocks in words."""
    if settings.single_blocks:
        double, single = COUNTS[settings.blocks], COUNTS[settings.single_blocks]
        return f"{double} double-stream and {single} single-stream block{'s' * (single != 'one')}"
    return f"{COUNTS[settings.blocks]} blocks"


def model_yaml(settings: Settings, path: str) -> str:
    """Return the text of `conf/model/NAME.yaml` for a pipeline at ``path``."""
    call = arguments(settings)
    guidance = call.pop("guidance_scale", None)
    words = {None: "null", True: "true", False: "false", "": '""'}
    given = ", ".join(f"{k}: {words.get(v, v)}" for k, v in call.items())
    pipeline = model.networks(settings).PIPELINE.__name__
    own = "" if path.startswith("asset:") else ", on a user's pictures"
    kind = "trained by this project" + own
    name = TITLES[settings.name].split("-")[0].split(".")[0]
    head = "The embedded model" if settings.name == "tiny_pixart" else f"The embedded {name}"
    what = f"{pipeline}, width {settings.width}, {blocks(settings)}, {settings.image_size} px"
    unused = " # the network has no guidance input; true_cfg_scale guides"
    return f"""# {head}: {what}, {kind}.
name: {settings.name}
family: {FAMILIES.get(settings.name, "auto")}
path: {path}
hub_id: null
revision: null
variant: null
domain: null # trained on {"emoji" if not own else "few pictures"}; compared with anything
dtype: float32
height: {settings.image_size}
width: {settings.image_size}
steps: {settings.inference_steps}
guidance: {f"null{unused}" if guidance is None else guidance}
max_sequence_length: {settings.text_length}
dtypes: {{}} # networks beside the transformer with another dtype, such as {{vae: float32}}
fps: null # of videos whose pipeline has no such argument
call: {{{given}}}
"""


def _number(value: Any, digits: int) -> str:
    """Return a number with so many digits, or a dash for what was not recorded."""
    return "–" if value is None else f"{value:.{digits}f}"


def _parts(folder: Path, settings: Settings, training: Mapping[str, Any]) -> str:
    """Return the table of the pipeline's components: class, sizes, parameters."""
    index = components(folder)
    counts = training["parameters"]
    notes = {
        "transformer": f"width {settings.width} = {settings.heads} x "
        f"{settings.width // settings.heads}, {blocks(settings)}, 64 tokens",
        "vae": f"stride {settings.stride}, {settings.latent_channels} channels, "
        "latents of unit variance",
        "text_encoder": f"2 layers, {settings.text_length} tokens of a byte-level BPE",
        "text_encoder_2": f"2 layers, width {settings.text_width}, the same tokens",
    }
    rows = ["| part | what | parameters |", "|---|---|---|"]
    for part, count in counts.items():
        rows.append(f"| {part} | `{index[part][1]}`, {notes[part]} | {count / 1e6:.1f} M |")
    return "\n".join([*rows, f"| scheduler | `{index['scheduler'][1]}` | |"])


def _scores(scores: Mapping[str, Any]) -> str:
    """Return the table of the scores."""
    rows = scores["rows"]
    aligned = "alignment" in rows["this model"]
    columns = {"fd_efflite0": 1}
    if aligned:
        keys = ("alignment_seen", "alignment_held", "matched_seen", "matched_held")
        columns |= {key: 2 if key.startswith("matched") else 3 for key in keys}
    titles = ("fd_efflite0", "alignment seen", "held out", "wins seen", "held out")
    lines = [
        f"| images | {' | '.join(titles[: len(columns)])} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name, row in rows.items():
        cells = " | ".join(f"{row[k] + 0:.{d}f}" for k, d in columns.items())
        lines.append(f"| {name} | {cells.replace('-0.0', '0.0')} |")
    return "\n".join(lines)


def _weights(rows: list[dict[str, str]]) -> str:
    """Return a sentence on how far training moved the weights."""

    def mean(key: str) -> float:
        return sum(float(row[key]) for row in rows) / len(rows)

    return (
        f"Mean over the {len(rows)} layers of the blocks: the first 16 singular directions hold "
        f"{mean('top16'):.0%} of the energy (Gaussian matrices of these shapes: "
        f"{mean('top16_random'):.0%}), kurtosis {mean('kurtosis'):.1f}, inputs' absmax over rms "
        f"{mean('activation_outlier'):.1f}."
    )


def card(folder: Path, record: Path, settings: Settings, own: bool = False) -> str:
    """Return the model card of an exported pipeline as Markdown."""
    name = settings.name
    training = json.loads((record / f"{name}_training.json").read_text(encoding="utf-8"))
    scores = json.loads((record / f"{name}_scores.json").read_text(encoding="utf-8"))
    with (record / f"{name}_weights.csv").open(encoding="utf-8", newline="") as stream:
        weights = list(csv.DictReader(stream))
    seen = record / f"{name}_seen.md"
    limits = (
        seen.read_text(encoding="utf-8").strip()
        if seen.exists()
        else f"Nobody has described the grid yet ({name}_seen.md in the record)."
    )
    pipeline = model.networks(settings).PIPELINE.__name__
    size = settings.image_size
    call = {
        "height": size,
        "width": size,
        "num_inference_steps": settings.inference_steps,
        "max_sequence_length": settings.text_length,
        **arguments(settings),
    }
    lines = "\n".join(f"    {k}={json.dumps(v) if v == '' else v}," for k, v in call.items())
    where = f"loraq/assets/{name}" if not own else "FOLDER"
    data = (
        f"{training['subjects']} pictures of a user's folder; {training['held_out']} more are held "
        "out. The autoencoder saw all."
        if own
        else f"{training['subjects']} Fluent 3D emoji on white, captions `<name>, "
        f"<subcategory>`; {training['held_out']} more names are held out (`captions.json`). The "
        f"autoencoder saw all {training['pictures']:,} named emoji."
    )
    command = f"python -m experiments.train_tiny.run --model {name}"
    proxy = "" if own else " Alignment is the proxy head's mean cosine; `wins` is how often the own"
    proxy += "" if own else " caption scores above another one (chance 0.5)."
    command += " --data FOLDER --out FOLDER" * own
    title = f"{name}: a small {TITLES[name]} trained from scratch"
    title += "" if own else " on captioned emoji"
    megabytes = f"{training['bytes'] / 1e6:.1f} MB"
    vae_minutes, minutes = _number(training["vae_minutes"], 0), _number(training["minutes"], 0)
    return f"""# {title}

A `{pipeline}` of {size} px in the ordinary `save_pretrained` layout, bf16, {megabytes}.

```python
pipe = {pipeline}.from_pretrained("{where}", torch_dtype=torch.float32)
pipe(
    "{"dog face, animal mammal" if not own else "…"}",
{lines}
)
```

Pass `torch_dtype`: without it, parts that a pipeline loads in different types do not fit together.

{_parts(folder, settings, training)}

**Data.** {data}

**Training.** `{command}`:
autoencoder {training["vae_steps"]:,} steps ({vae_minutes} minutes); text encoders and transformer
jointly by flow matching, {training["steps"]:,} steps ({minutes} minutes), AdamW, weight decay 0.1,
caption dropout {settings.caption_dropout}, averaged weights. The loss ends at
{_number(training["loss"], 3)}.

**Scores.** {scores["captions"]} test captions (seen and held out in turn), {scores["steps"]} steps,
guidance {scores["guidance"]:g}, one seed per name. The Fréchet distance is on EfficientNet-Lite0
features (rank-deficient at this N; it is not FID).{proxy}

{_scores(scores)}

**Weights left their random start.** {_weights(weights)}
Per layer: `{name}_weights.csv` in the record of the training.

**Honest limits.** {limits} The model memorises on purpose; it is a test subject for quantisers.
"""


def main(folder: Path, record: Path, settings: Settings, yaml: Path, own: bool) -> None:
    """Write the card into the pipeline's folder, and the model's configuration."""
    write_text(folder / "README.md", card(folder, record, settings, own))
    path = str(folder.resolve()) if own else f"asset:{settings.name}"
    write_text(yaml, model_yaml(settings, path))
    print(f"{folder / 'README.md'}\n{yaml}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    name = os.environ.get("LORAQ_TRAIN_MODEL", "tiny_pixart")
    parser.add_argument("--model", choices=sorted(MODELS), default=name)
    parser.add_argument("--folder", type=Path, help="exported pipeline; default: the asset")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--yaml", type=Path, help="default: conf/model/NAME.yaml")
    parser.add_argument("--own", action="store_true", help="trained on a user's pictures")
    a = parser.parse_args()
    main(
        a.folder or ASSETS / a.model,
        a.record,
        MODELS[a.model],
        a.yaml or ROOT / "conf" / "model" / f"{a.model}.yaml",
        a.own,
    )
