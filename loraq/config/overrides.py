"""Overrides of the command line: parsed, checked against `conf/`, expanded for sweeps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from loraq.config.composition import Composer
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown
from loraq.utils.assets import CONF

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def config_groups() -> dict[str, list[str]]:
    """The groups of `conf/` and their options."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep: all combinations of the values."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not GlobalHydra.instance().is_initialized():
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return expand_sweep(overrides)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices: dict[str, list[str]] = {}
    try:
        for entry in parser.parse_overrides(list(overrides)):
            key = entry.get_key_element()
            if entry.is_discrete_sweep():
                values = list(entry.sweep_string_iterator())
            elif entry.is_sweep_override():
                raise LoraqError(
                    f"{entry.input_line} has no values to sweep over. Write KEY=A,B or "
                    "KEY=range(FIRST,END) or KEY=choice(A,B)."
                )
            else:
                values = [entry.get_value_element_as_str()]
            choices[key] = [f"{key}={value}" for value in values]
    except HydraException as error:
        raise LoraqError(f"The sweep cannot be parsed: {error}") from None
    return [list(job) for job in itertools.product(*choices.values())]


def override_key(entry: Override) -> str:
    """The key of an override: `quant.seed`, `method`, `format@quant.weight`."""
    package = entry.package
    return entry.key_or_group + (f"@{package}" if package is not None else "")


def parse_overrides(overrides: Sequence[str], composer: Composer) -> dict[str, Override]:
    """Parse the overrides; an unknown group, option or key raises LoraqError with near matches."""
    known = config_groups()
    keys: list[str] | None = None
    parsed: dict[str, Override] = {}
    for override in overrides:
        entry = composer.parse(override)
        parsed.pop(override, None)  # repeated: its last position counts, as in Hydra
        parsed[override] = entry
        if entry.is_sweep_override():
            raise LoraqError(
                f"{override} sweeps over several values; this command runs one configuration. "
                f"Sweep with: loraq sweep {override} (or python -m loraq.run --multirun …)"
            )
        if entry.is_add() or entry.is_delete() or entry.key_or_group.startswith("hydra"):
            continue
        name, value = entry.key_or_group, entry.value()
        if entry.package is not None or name in known:
            if name not in known:
                raise LoraqError(f"{override}: {unknown('config group', name, known)}")
            mounts = [
                "quant.weight",
                "quant.activation",
                "quant.branch_weight",
                "quant.branch_activation",
            ]
            if name == "format" and entry.package not in mounts:
                options = [f"format@{mount}" for mount in mounts]
                raise LoraqError(f"{override}: {unknown('operand', override_key(entry), options)}")
            if value is None:
                raise LoraqError(
                    f"{override}: a group needs an option. Leave it out for the default, or set "
                    f"one of {', '.join(known[name])}."
                )
            if str(value) not in known[name]:
                raise LoraqError(f"{override}: {unknown(name, str(value), known[name])}")
            continue
        if keys is None:
            keys = flat_keys(composer.compose([]))
        if name not in keys:
            guess = did_you_mean(near_matches(name, [*keys, *known]))
            raise LoraqError(
                f"{override}: unknown setting '{name}'.{guess}\n"
                "  conf/config.yaml and its groups contain all settings with their defaults."
            )
    return parsed


def flat_keys(tree: Any, prefix: str = "") -> list[str]:
    names = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        names.append(path)
        if isinstance(value, dict):
            names += flat_keys(value, path + ".")
    return names
