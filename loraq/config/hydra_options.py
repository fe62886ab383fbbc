"""Hydra's own options on the command `loraq`: `--cfg job`, and those that mean nothing here."""

from __future__ import annotations

from collections.abc import Sequence

from loraq.errors import LoraqError

_CONF = (
    "The configuration is conf/: give values as KEY=VALUE, a file of your own as "
    "conf/GROUP/NAME.yaml with GROUP=NAME"
)
_REFUSED = (
    (("--multirun", "-m"), "Sweep with: loraq sweep KEY=A,B"),
    (("--run", "-r"), "One configuration is what is run anyway: leave it out"),
    (("--config-name", "-cn"), _CONF),
    (("--config-path", "-cp"), _CONF),
    (("--config-dir", "-cd"), _CONF),
    (("--package", "-p"), "Whole rows are printed: loraq run --cfg job KEY=VALUE"),
    (("--info", "-i"), "See what is composed with --cfg job, what would be made with --dry-run"),
    (("--hydra-help",), "See loraq run --help, and conf/config.yaml for all settings"),
    (("--experimental-rerun",), "Give the same command again: what is finished is not made anew"),
    (("--shell-completion", "-sc"), "See loraq run --help, and conf/ for groups and their options"),
)


def refuse_options(arguments: Sequence[str]) -> None:
    """LoraqError, with what to use instead, for an option of Hydra's that has no effect here."""
    for argument in arguments:
        given = argument.split("=")[0]
        for names, remedy in _REFUSED:
            if given in names:
                raise LoraqError(
                    f"{given} is an option of Hydra's that has no effect here. {remedy}."
                )


def check_cfg(cfg: str | None, resolve: bool, dry_run: bool) -> None:
    """LoraqError for `--cfg` of anything but the job, and for options that exclude each other."""
    if cfg is None:
        if resolve:
            raise LoraqError("--resolve has no effect by itself. Add --cfg job, or leave it out.")
    elif cfg != "job":
        raise LoraqError(
            f"--cfg {cfg}: only the job's own configuration is composed here, not Hydra's. "
            "Take --cfg job."
        )
    elif dry_run:
        raise LoraqError("--cfg job and --dry-run each print and stop. Drop one of the two.")
