"""One worker of the campaign: imports everything once, then runs the trials that it is told.

    python -m tests.faults.worker HOME SEED      (with PYTHONPATH=HOME/copy)

Reads `KIND NUMBER` per line and answers with one line of JSON.
"""

from __future__ import annotations

from loraq.utils import batch_invariance

batch_invariance.configure_cpu_math()  # before anything imports torch

import importlib  # noqa: E402
import json  # noqa: E402
import pkgutil  # noqa: E402
import random  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

from tests.faults.bench import Bench, BrokenCampaign, Trial  # noqa: E402
from tests.faults.damaged import try_damage  # noqa: E402
from tests.faults.killed import try_kill  # noqa: E402
from tests.faults.obstacle import try_obstacle  # noqa: E402
from tests.faults.processes import run  # noqa: E402
from tests.faults.together import try_together  # noqa: E402

KINDS = {
    "killed": try_kill,
    "damaged": try_damage,
    "together": try_together,
    "obstacle": try_obstacle,
}
PACKAGES = "matplotlib.pyplot lpips torchmetrics hydra.main cleanfid.resize scipy.linalg filelock"
PACKAGES += " safetensors.torch jinja2"
CLASSES = {
    "diffusers": ("PixArtSigmaPipeline", "DPMSolverMultistepScheduler", "AutoencoderKL"),
    "transformers": ("T5EncoderModel", "PreTrainedTokenizerFast"),
}


def preload() -> None:
    """Import what commands import; runs nothing that remembers files."""
    import loraq

    for name in PACKAGES.split():
        importlib.import_module(name)
    for package, classes in CLASSES.items():
        for name in classes:
            getattr(importlib.import_module(package), name)
    for module in pkgutil.walk_packages(loraq.__path__, "loraq."):
        if "triton" not in module.name and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    batch_invariance.row_invariant()


def make_model() -> None:
    """Save the small pipeline into `model/`."""
    from tests.little import little_pixart

    little_pixart().save_pretrained("model")


def run_trial(bench: Bench, seed: int, kind: str, number: int) -> dict[str, Any]:
    """Run one trial, and return what happened."""
    chance = random.Random(f"{seed} {kind} {number}")
    trial = Trial(kind, number, chance, bench.home / f"{kind}-{number}")
    started = time.monotonic()
    KINDS[kind](bench, trial)
    shutil.rmtree(trial.folder, ignore_errors=True)
    return {
        "kind": kind,
        "number": number,
        "what": trial.what,
        "where": trial.where,
        "held": not trial.failures,
        "failures": trial.failures[:8],
        "output": [one.words for one in trial.ended] if trial.failures else [],
        "seconds": time.monotonic() - started,
        "commands": len(trial.ended),
    }


def main() -> None:
    """Answer lines of stdin until it ends."""
    home, seed = Path(sys.argv[1]), int(sys.argv[2])
    preload()
    bench = Bench(home)
    if not (home / "model").is_dir():
        made = run(make_model, home)
        if made.code:
            raise SystemExit(made.text)
    for line in sys.stdin:
        kind, number = line.split()
        try:
            answer = run_trial(bench, seed, kind, int(number))
        except BrokenCampaign as error:
            answer = {"kind": kind, "number": int(number), "broken": str(error)}
        except Exception:
            answer = {"kind": kind, "number": int(number), "broken": traceback.format_exc()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
