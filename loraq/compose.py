"""Overrides → rows: Hydra composes, this file answers what the user misspelt.

An experiment is a list of rows, each with overrides of its own; every row becomes its own `Config`
and all are checked before anything runs. Without an experiment there are two rows: the 16-bit
reference and what the overrides say.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loraq.config import Config, Recipe
from loraq.config.convert import from_plain
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown
from loraq.models.layers import with_default_skip
from loraq.utils.user_module import is_own_file, label

CONF = Path(__file__).resolve().parent / "conf"
_BRANCH_KEYS = ("quant.branch", "format@quant.branch", "quant.requantize_intermediate")


def load_rows(overrides: Sequence[str], *, family_skip: bool = True) -> list[Config]:
    """The rows that these overrides describe, in order, the 16-bit reference among them.

    family_skip: a recipe without a skip list of its own gets that of the row's model family.
    """
    rows = _load_rows(overrides)
    return [_with_family_skip(row) for row in rows] if family_skip else rows


def recipe(method: str, *overrides: str) -> Recipe:
    """The recipe of a method's preset in `conf/method/`, with overrides as on the command line.

    `recipe("loraq_o2", "format@quant.branch_weight=int4", "quant.branch.budget=0.32")`

    Without `quant.skip=[…]` it has no list of skipped layers; quantising takes the model family's.
    """
    made = load_rows([f"method={method}", *overrides], family_skip=False)[-1].quant
    if made is None:
        raise LoraqError(
            f"method={method} is the 16-bit model itself and has no recipe. Take a method that "
            "quantises, such as loraq_o2, svdquant or rtn."
        )
    return made


def _with_family_skip(row: Config) -> Config:
    if row.quant is None:
        return row
    return replace(row, quant=with_default_skip(row.quant, row.model.family))


def _load_rows(overrides: Sequence[str]) -> list[Config]:
    overrides = [override for override in overrides if override]
    with _hydra() as compose:
        parsed = _check(overrides, compose)
        chosen = [o for o, entry in parsed.items() if _key(entry) == "experiment"]
        rows = compose(chosen).get("rows")
        if not rows:
            return _single(parsed, compose)
        return _experiment(rows, chosen, parsed, compose)


def groups() -> dict[str, list[str]]:
    """Config groups and their options, as they lie in `conf/`."""
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF.iterdir())
        if folder.is_dir() and folder.name != "hydra"
    }


def swept(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a sweep, as Hydra's own sweeper multiplies them out."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    with _hydra():
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        try:
            parsed = parser.parse_overrides(list(overrides))
            return [list(job) for job in BasicSweeper.split_arguments(parsed, None)[0]]
        except HydraException as error:
            raise LoraqError(f"The sweep does not parse: {error}") from None


def _single(parsed: dict[str, Any], compose: Any) -> list[Config]:
    quantised = not any(o.replace(" ", "") == "method=reference" for o in parsed)
    useless = [o for o in parsed if o not in _applying(parsed, quantised, branch=True)]
    if useless:
        raise LoraqError(
            f"{useless[0]} has no effect: method=reference quantises nothing. Drop one of the two."
        )
    config = _convert(compose(list(parsed)), "this run")
    if config.quant is None:
        return [replace(config, row="reference", label=config.label or "16-bit")]
    if config.quant.branch.kind == "none":
        if any(_key(entry) == "quant.branch.kind" for entry in parsed.values()):
            raise LoraqError(
                f"quant.branch.kind=none leaves of method '{config.method}' what method=rtn is. "
                "Take that, with the formats, transform and rounding that you want."
            )
        useless = [o for o in parsed if o not in _applying(parsed, True, branch=False)]
        if useless:
            raise LoraqError(
                f"{useless[0]} has no effect: method '{config.method}' has no low-rank branch. "
                "Drop it, or take a method with a branch (method=svdquant, method=loraq_o2)."
            )
    row = config.row or config.method
    reference = replace(config, method="reference", quant=None, row="reference", label="16-bit")
    return [reference, replace(config, row=row, label=config.label or row)]


def _experiment(rows: Any, chosen: list[str], parsed: dict[str, Any], compose: Any) -> list[Config]:
    only = [str(entry.value()) for entry in parsed.values() if _key(entry) == "row"]
    names = [str(row.name) for row in rows]
    if only and only[0] not in names:
        raise unknown(f"row of {' '.join(chosen)}", only[0], names)
    if len(set(names)) < len(names):
        raise LoraqError(f"{' '.join(chosen)}: two rows have the same name; rename one.")
    parsed = {override: entry for override, entry in parsed.items() if _key(entry) != "row"}
    for override, entry in parsed.items():
        if _key(entry) in ("method", "label"):
            raise LoraqError(
                f"{override} does not go together with {' '.join(chosen)}: its rows set the "
                f"{_key(entry)} themselves. Drop one of the two."
            )
    configs, used = [], set(chosen)
    for row in rows:
        where = f"row '{row.name}' of {' '.join(chosen)}"
        own = [*chosen, *row.overrides]
        _check(list(row.overrides), compose)
        plain = compose(own)  # without the user's overrides, to see which of them apply
        quantised = plain.quant is not None
        branch = quantised and plain.quant.branch.kind != "none"
        wanted = _applying(parsed, quantised, branch)
        used |= set(wanted)
        config = _convert(compose([*own, *(o for o in wanted if o not in chosen)]), where)
        configs.append(replace(config, row=str(row.name), label=str(row.label)))
    useless = [override for override in parsed if override not in used]
    if useless:
        raise LoraqError(f"{useless[0]} has no effect on any row of {' '.join(chosen)}. Drop it.")
    if not any(config.quant is None for config in configs):
        first = replace(configs[0], method="reference", quant=None, row="reference", label="16-bit")
        configs.insert(0, first)
    if only:
        configs = [config for config in configs if config.quant is None or config.row == only[0]]
    return sorted(configs, key=lambda config: config.quant is not None)


def _applying(parsed: dict[str, Any], quantised: bool, branch: bool) -> list[str]:
    """The user's overrides that mean something for a row with(out) quantisation or branch."""
    kept = []
    for override, entry in parsed.items():
        key = _key(entry)
        if not quantised and (key.startswith("quant.") or "@quant." in key):
            continue
        if not branch and key.startswith(_BRANCH_KEYS):
            continue
        kept.append(override)
    return kept


def _convert(composed: Any, where: str) -> Config:
    try:
        return from_hydra(composed)
    except LoraqError as error:
        raise LoraqError(f"{error}\n  (in {where})") from None


def _key(entry: Any) -> str:
    """An override's key as written: `quant.seed`, `method`, `format@quant.weight`."""
    package = entry.package
    return entry.key_or_group + (f"@{package}" if package is not None else "")


@contextlib.contextmanager
def _hydra() -> Iterator[Any]:
    """A function from overrides to the composed config, whether or not Hydra already runs."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    made: dict[tuple[str, ...], Any] = {}

    def composed(overrides: Sequence[str]) -> Any:
        try:
            if tuple(overrides) not in made:
                made[tuple(overrides)] = compose("config", overrides=list(overrides))
            return made[tuple(overrides)]
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            cause = error.__cause__
            if cause is not None and str(cause).strip():
                lines.append(str(cause).strip().splitlines()[0])
            raise LoraqError(
                f"The configuration does not compose: {' '.join(lines[:3])}\n"
                f"  Overrides: {' '.join(overrides) or 'none'}. See conf/ for groups and keys."
            ) from None

    if GlobalHydra.instance().is_initialized():
        yield composed
        return
    with initialize_config_dir(str(CONF.resolve()), version_base="1.3"):
        yield composed


def _check(overrides: Sequence[str], compose: Any) -> dict[str, Any]:
    """Each override parsed; one that names no group, option or key raises with near matches."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException
    from omegaconf import OmegaConf

    known = groups()
    keys: list[str] | None = None
    parser = OverridesParser.create()
    parsed = {}
    for override in overrides:
        try:
            entry = parser.parse_override(override)
        except HydraException:
            raise LoraqError(
                f"'{override}' is no override. Write KEY=VALUE, such as data.count=16 or "
                "method=rtn (quote values with spaces or commas: 'label=\"a, b\"')."
            ) from None
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
                raise LoraqError(f"{override}: {unknown('operand', _key(entry), options)}")
            if value is not None and str(value) not in known[name]:
                raise LoraqError(f"{override}: {unknown(name, str(value), known[name])}")
            continue
        if keys is None:
            plain = OmegaConf.to_container(compose([]), resolve=False)
            keys = _flatten(plain)
        if name not in keys:
            guess = did_you_mean(near_matches(name, [*keys, *known]))
            raise LoraqError(
                f"{override}: there is no setting '{name}'.{guess}\n"
                "  All settings with their defaults stand in conf/config.yaml and its groups."
            )
    return parsed


def _flatten(tree: Any, prefix: str = "") -> list[str]:
    names = []
    for name, value in tree.items():
        path = f"{prefix}{name}"
        names.append(path)
        if isinstance(value, dict):
            names += _flatten(value, path + ".")
    return names


def from_hydra(composed: Any) -> Config:
    """The composed Hydra config as a checked `Config`: the door."""
    from omegaconf import OmegaConf

    plain = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(plain, dict)
    plain = {str(name): value for name, value in plain.items() if name not in ("rows", "hydra")}
    config: Config = from_plain(Config, plain)
    if config.quant is not None:
        config.quant.formats()
        if is_own_file(config.quant.branch.kind):
            label(config.quant.branch.kind)  # a file that is not there is answered here
    from loraq.metrics.registry import find_metric

    for name in config.metrics.names:
        try:
            find_metric(name)
        except LoraqError as error:
            raise LoraqError(f"metrics.names: {error}") from None
    return config
