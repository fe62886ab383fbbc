"""Run an experiment through Hydra's own entry point: `python -m loraq.run [--multirun] KEY=VALUE`.

`loraq/runner/experiment.py` defines the experiment: start reading there. `loraq run` also has
`--dry-run`, `--cfg` and `--help`; `--multirun` is the same as `loraq sweep`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraq.utils.assets import CONF
from loraq.utils.batch_invariance import configure_cpu_math
from loraq.utils.failures import reporting_errors

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from loraq.runner.publish import Outcome

__all__ = ["main", "run"]


def run(overrides: Sequence[str], progress: bool = True) -> Outcome:
    """Call `loraq.runner.experiment.run` after configuring the CPU's arithmetic."""
    configure_cpu_math()  # before torch is imported
    from loraq.runner import experiment

    return experiment.run(overrides, progress)


def main() -> None:
    """Hydra's entry point; `--multirun` starts a sweep."""
    configure_cpu_math()
    multirun = {"--multirun", "-m"} & set(sys.argv[1:])
    if multirun:
        from loraq.runner.sweep import launch_sweep

        with reporting_errors():
            print(launch_sweep([argument for argument in sys.argv[1:] if argument not in multirun]))
        return
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.3", config_path=str(CONF.resolve()), config_name="config")
    def job(_composed: DictConfig) -> None:
        with reporting_errors():
            task = HydraConfig.get().overrides.task
            print(run(OmegaConf.to_container(task, resolve=False)).text)

    job()


if __name__ == "__main__":
    main()
