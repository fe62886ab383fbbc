"""Hydra's options on the command `loraq`: `--cfg job`, and the options without effect."""

from __future__ import annotations

from collections.abc import Sequence

from loraq.errors import LoraqError

_CONF = (
    "The configuration is in conf/: set values with KEY=VALUE, or add a file "
    "conf/GROUP/NAME.yaml and select it with GROUP=NAME"
)
_REFUSED = (
    (("--multirun", "-m"), "Sweep with: loraq sweep KEY=A,B"),
    (("--run", "-r"), "This is the default: leave it out"),
    (("--config-name", "-cn"), _CONF),
    (("--config-path", "-cp"), _CONF),
    (("--config-dir", "-cd"), _CONF),
    (("--package", "-p"), "Complete rows are printed: loraq run --cfg job KEY=VALUE"),
    (("--info", "-i"), "Print the configuration with --cfg job, the planned work with --dry-run"),
    (("--hydra-help",), "See loraq run --help, and conf/config.yaml for all settings"),
    (("--experimental-rerun",), "Run the same command again: finished work is reused"),
    (("--shell-completion", "-sc"), "See loraq run --help, and conf/ for groups and their options"),
)


def refuse_options(arguments: Sequence[str]) -> None:
    """LoraqError with a remedy for an option of Hydra that has no effect here."""
    for argument in arguments:
        given = argument.split("=")[0]
        for names, remedy in _REFUSED:
            if given in names:
                raise LoraqError(f"{given} is an option of Hydra and has no effect here. {remedy}.")


def check_cfg_option(cfg: str | None, resolve: bool, dry_run: bool) -> None:
    """LoraqError for `--cfg` with a value other than `job`, or with options that it excludes."""
    if cfg is None:
        if resolve:
            raise LoraqError(
                "--resolve has no effect without --cfg job. Add --cfg job, or leave --resolve out."
            )
    elif cfg != "job":
        raise LoraqError(
            f"--cfg {cfg}: only the configuration of the job can be printed, not Hydra's. "
            "Use --cfg job."
        )
    elif dry_run:
        raise LoraqError("--cfg job and --dry-run exclude each other. Leave one of them out.")
