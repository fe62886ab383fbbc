"""Compose by Hydra's own code, and resolve interpolations. Hydra is imported when it is used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraq.errors import LoraqError
from loraq.utils.assets import CONF

PRIMARY = "config"
"""Name of the primary configuration file, `conf/config.yaml`."""


def has_other_folders() -> bool:
    """Whether Hydra is initialised with `--config-dir` or `--config-path` of the command line."""
    from hydra.core.global_hydra import GlobalHydra

    if not GlobalHydra.instance().is_initialized():
        return False
    found, ours = (
        GlobalHydra.instance().config_loader().get_search_path().get_path(),
        CONF.resolve(),
    )
    return any(
        entry.provider == "command-line"
        or (entry.provider == "main" and Path(entry.path.removeprefix("file://")).resolve() != ours)
        for entry in found
    )


def compose_with_hydra(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Compose with Hydra, initialised already or not; LoraqError if the composition fails."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        if GlobalHydra.instance().is_initialized():
            composed = compose(PRIMARY, overrides=list(overrides))
        else:
            with initialize_config_dir(str(folder.resolve()), version_base="1.3"):
                composed = compose(PRIMARY, overrides=list(overrides))
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        cause = error.__cause__
        if cause is not None and str(cause).strip():
            lines.append(str(cause).strip().splitlines()[0])
        raise LoraqError(
            f"The configuration cannot be composed: {' '.join(lines[:3])}\n"
            f"  Overrides: {' '.join(overrides) or 'none'}. See conf/ for groups and keys."
        ) from None
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}


def resolve_interpolations(tree: Mapping[str, Any]) -> Mapping[str, Any]:
    """Replace the interpolations in `tree`, such as `${generate.seed}`, by their values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if "${" not in str(tree):
        return tree
    try:
        plain = OmegaConf.to_container(OmegaConf.create(dict(tree)), resolve=True)
    except OmegaConfBaseException as error:
        raise LoraqError(
            f"An interpolation cannot be resolved: {str(error).splitlines()[0]}. Use the name of a "
            "setting, such as ${generate.seed}, or an environment variable that is set."
        ) from None
    assert isinstance(plain, dict)
    return {str(name): value for name, value in plain.items()}
