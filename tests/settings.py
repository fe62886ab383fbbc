"""Settings of a short run, for `loraq.runner.experiment.run`."""

from __future__ import annotations

from pathlib import Path


def small_run(model: Path, captions: Path, output: Path) -> list[str]:
    """Settings with which a row on a small pipeline runs in one or two seconds."""
    return [
        f"model.path={model}",
        "model.height=64",
        "model.width=64",
        "model.steps=2",
        "model.max_sequence_length=8",
        f"data.captions={captions}",
        "data.count=4",
        "data.real=null",
        "metrics.names=[psnr]",
        "metrics.bootstrap=100",
        "generate.batch_size=2",
        "calibration.prompts=2",
        "calibration.measure_prompts=2",
        "calibration.rows_per_layer=64",
        "tracking=disabled",
        "device=cpu",
        f"output={output}",
    ]
