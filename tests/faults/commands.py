"""The commands of the campaign on a small model: every phase of a run, and its readers.

They run in a folder with `model/` and `captions.json` and write to `outputs/`, their default.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loraq.cli import make_parsers
from tests.faults.processes import Program
from tests.settings import small_run

SMALL = [
    *(
        setting
        for setting in small_run(Path("model"), Path("captions.json"), Path("outputs"))
        if not setting.startswith(("metrics.", "data.", "output=", "generate."))
    ),
    *("metrics.bootstrap=100", "generate.batch_size=1", "data.count=2"),
]
OWN = [*SMALL, "data.captions=captions.json", "data.real=null", "metrics.names=[psnr]"]
ALL_METRICS = [*SMALL, "data.captions=asset:captions.json"]
PACKAGED = [
    *(s for s in SMALL if not s.startswith(("model.", "data.count"))),
    *("model=tiny_pixart", "model.steps=1", "data.count=1", "metrics=paired"),
    *("data.captions=asset:captions.json", "method=reference"),
]
ALLOCATED = ["quant.allocation.kind=rank", "quant.allocation.sensitivity=activations"]
SCORED = ["data.captions=captions.json", "data.real=null", "data.count=2", "metrics.names=[psnr]"]
SCORED += [s for s in SMALL if s.startswith(("calibration.", "metrics.", "device="))]
SAMPLED = [s for s in SMALL if s.startswith("model.") and not s.startswith("model.path")]


@dataclass(frozen=True)
class Work:
    """A command, and the works whose products it reads."""

    program: Program
    after: Sequence[str] = ()


def _run(*overrides: str, command: str = "run") -> Work:
    return Work([command, "--quiet", *overrides])


def save_quantized() -> None:
    """A user's program: quantise a pipeline with a folder for its groups, and save it packed."""
    import diffusers

    import loraq

    pipe = diffusers.PixArtSigmaPipeline.from_pretrained("model")
    loraq.quantize(pipe, "loraq_o2", checkpoint_dir="groups", progress=False)
    pipe.save_pretrained("saved")


def load_saved() -> None:
    """A user's program: load the packed transformer, and write the hash of all its tensors."""
    import diffusers

    import loraq.diffusers_quantizer  # noqa: F401

    model = diffusers.PixArtTransformer2DModel.from_pretrained("saved/transformer")
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        total.update(tensor.contiguous().view(-1).view(dtype=_bytes()).numpy().tobytes())
    Path("outputs").mkdir(exist_ok=True)
    Path("outputs/loaded").write_text(total.hexdigest())


def _bytes():
    import torch

    return torch.uint8


WORKS = {
    "rtn": _run("method=rtn", *OWN),
    "svdquant": _run("method=svdquant", *OWN),
    "gptq": _run("method=gptq", *OWN),
    "best": _run("method=loraq_best", *OWN),
    "allocated": _run("method=loraq_o2", *ALLOCATED, *OWN),
    "metrics": _run("method=rtn", *ALL_METRICS),
    "packaged": _run(*PACKAGED),
    "quantize": _run("method=loraq_o2", *OWN, command="quantize"),
    "generate": _run("method=loraq_o2", *OWN, command="generate"),
    "sweep": Work(["sweep", "method=rtn,lqer", *OWN]),
    "tables": Work(["tables"], after=["rtn"]),
    "report": Work(["report", "rtn"], after=["rtn"]),
    "images": Work(
        ["score", "{images}", *SCORED, "--against", "{reference}", "--json", "scores.json"],
        after=["rtn"],
    ),
    "save": Work(save_quantized),
    "load": Work(load_saved, after=["save"]),
    "pipeline": Work(
        ["score", "saved", *SCORED, *SAMPLED, "--quiet", "--json", "pipeline.json"], after=["save"]
    ),
}
VERIFY = ["cache", "--verify"]


def remove_partial() -> list[str]:
    """`loraq cache --remove partial`, with the option that confirms it where there is one."""
    confirm = ["--yes"] if "--yes" in make_parsers()[1]["cache"].format_help() else []
    return ["cache", "--remove", "partial", *confirm]


def filled(program: Program, folder: Path) -> Program:
    """`program` with the folders of RTN's and the 16-bit model's images of the run in `folder`."""
    if callable(program) or "{images}" not in program:
        return program
    rows = json.loads(next(folder.glob("outputs/results/rtn-*/rows.json")).read_text())["rows"]
    values = {"{reference}": rows[0]["images"], "{images}": rows[-1]["images"]}
    return [f"outputs/images/{values[word]}" if word in values else word for word in program]
