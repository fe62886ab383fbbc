"""Overrides of the command line: parsed, checked against `conf/`, expanded for sweeps."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraq.config.composition import Composer
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown
from loraq.utils.assets import CONF

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

MOST_JOBS = 100_000
"""The largest sweep; every job is composed before the first one runs."""
OPEN = ("model.call.", "model.dtypes.")
"""Settings whose keys differ from model to model; whether one needs a plus is Hydra's to say."""


def config_groups() -> dict[str, list[str]]:
    """The groups of `conf/` and their options."""
    return Composer(CONF).groups


def expand_sweep(overrides: Sequence[str], at_most: int = MOST_JOBS) -> list[list[str]]:
    """The overrides of every job of a sweep: all combinations of the values.

    LoraqError for more than `at_most` jobs, before they are listed.
    """
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    if not GlobalHydra.instance().is_initialized():
        with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
            return expand_sweep(overrides, at_most)
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    choices: dict[str, list[str]] = {}
    try:
        for entry in parser.parse_overrides(list(overrides)):
            key = entry.get_key_element()
            if entry.is_discrete_sweep():
                values = list(itertools.islice(entry.sweep_string_iterator(), MOST_JOBS + 1))
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
    _check_size([len(values) for values in choices.values()], at_most)
    return [list(job) for job in itertools.product(*choices.values())]


def _check_size(sizes: Sequence[int], at_most: int) -> None:
    count = math.prod(sizes)
    if count > at_most:
        more = "more than " if max(sizes) > MOST_JOBS else ""
        factors = [f"{size:,}" for size in sizes if size > 1]
        counted = f" ({' × '.join(factors)})" if len(factors) > 1 else ""
        remedy = " or confirm this many with `loraq sweep --yes`" if count <= MOST_JOBS else ""
        raise LoraqError(
            f"This sweep has {more}{count:,} jobs{counted}; the limit is {at_most:,}. Sweep "
            f"over fewer values{remedy}."
        )


def override_key(entry: Override) -> str:
    """The key of an override: `quant.seed`, `method`, `format@quant.weight`."""
    package = entry.package
    return entry.key_or_group + (f"@{package}" if package is not None else "")


def parse_overrides(overrides: Sequence[str], composer: Composer) -> dict[str, Override]:
    """Parse the overrides; an unknown group, option or key raises LoraqError with near matches."""
    known = composer.groups
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
        name, value = entry.key_or_group, entry.value()
        if name == "rows":
            raise LoraqError(
                f"{override}: rows are read only from a file. Write them to "
                "conf/experiment/NAME.yaml, and run experiment=NAME."
            )
        if name.replace("/", ".").partition(".")[0] == "hydra":
            raise LoraqError(
                f"{override} is a setting of Hydra and has no effect here. Leave it out; only "
                "`loraq sweep` reads them (hydra/launcher=slurm)."
            )
        if entry.is_add() or entry.is_delete():
            continue
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
        if name not in composer.keys and not name.startswith(OPEN):
            guess = did_you_mean(near_matches(name, [*composer.keys, *known]))
            raise LoraqError(
                f"{override}: unknown setting '{name}'.{guess}\n"
                "  conf/config.yaml and its groups contain all settings with their defaults."
            )
    return parsed
