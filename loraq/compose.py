"""Overrides → rows: composes and checks the configuration of every row of an experiment.

An experiment is a list of rows with overrides; each row becomes one `Config`, and all rows are
checked before anything runs. Without an experiment there are two rows: the 16-bit reference and the
configuration of the overrides.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loraq.config import Config, Recipe
from loraq.config.by_hydra import resolve_interpolations
from loraq.config.composition import Composer
from loraq.config.convert import from_plain
from loraq.errors import LoraqError, did_you_mean, near_matches, unknown
from loraq.metrics.registry import find_metric
from loraq.models.layers import with_default_skip
from loraq.utils.assets import CONF
from loraq.utils.user_module import is_user_file, user_file_label

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_BRANCH_KEYS = ("quant.branch", "format@quant.branch", "quant.requantize_intermediate")


@dataclass(frozen=True)
class ComposedRow:
    """The configuration of one row; `written`: its plain data, interpolations not resolved."""

    config: Config
    written: dict[str, Any] = field(repr=False)

    def replace(self, **values: Any) -> ComposedRow:
        """The row with other values of `Config` fields, in `config` and `written`."""
        return ComposedRow(replace(self.config, **values), {**self.written, **values})


def load_rows(overrides: Sequence[str], *, family_skip: bool = True) -> list[Config]:
    """The rows of a command in order, including the 16-bit reference.

    family_skip: replace `skip=None` in recipes by the skip list of the row's model family.
    LoraqError for an invalid override.
    """
    rows = [row.config for row in compose_rows(overrides)]
    return [_with_family_skip(row) for row in rows] if family_skip else rows


def recipe(method: str, *overrides: str) -> Recipe:
    """The recipe of a preset in `conf/method/`, with overrides as on the command line.

    `recipe("loraq_o2", "format@quant.branch_weight=int4", "quant.branch.budget=0.32")`

    Without an override `quant.skip=[…]`, its `skip` is None: quantising uses the model family's
    list.
    """
    found = load_rows([f"method={method}", *overrides], family_skip=False)[-1].quant
    if found is None:
        raise LoraqError(
            f"method={method} is the 16-bit model and has no recipe. Use a method that quantises, "
            "such as loraq_o2, svdquant or rtn."
        )
    return found


def _with_family_skip(row: Config) -> Config:
    if row.quant is None:
        return row
    return replace(row, quant=with_default_skip(row.quant, row.model.family))


def compose_rows(overrides: Sequence[str]) -> list[ComposedRow]:
    """The rows, each with its plain data."""
    composer = Composer(CONF)
    parsed = _parse_overrides([override for override in overrides if override], composer)
    chosen = [o for o, entry in parsed.items() if _key(entry) == "experiment"]
    rows = composer.compose(chosen).get("rows")
    if not rows:
        return _single(parsed, composer)
    return _experiment(rows, chosen, parsed, composer)


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


def _single(parsed: Mapping[str, Override], composer: Composer) -> list[ComposedRow]:
    quantised = not any(o.replace(" ", "") == "method=reference" for o in parsed)
    unused = [o for o in parsed if o not in _applying(parsed, quantised, branch=True)]
    if unused:
        raise LoraqError(
            f"{unused[0]} has no effect: method=reference quantises nothing. Leave one of them out."
        )
    row = _convert(composer.compose(list(parsed)), "this run")
    config = row.config
    if config.quant is None:
        return [row.replace(row="reference", label=config.label or "16-bit")]
    if config.quant.branch.kind == "none":
        if any(_key(entry) == "quant.branch.kind" for entry in parsed.values()):
            raise LoraqError(
                f"quant.branch.kind=none: method '{config.method}' without a branch is method=rtn. "
                "Use method=rtn, with the formats, transform and rounding that you want."
            )
        unused = [o for o in parsed if o not in _applying(parsed, True, branch=False)]
        if unused:
            raise LoraqError(
                f"{unused[0]} has no effect: method '{config.method}' has no low-rank branch. "
                "Leave it out, or use a method with a branch (method=svdquant, method=loraq_o2)."
            )
    name = config.row or config.method
    return [_reference(row), row.replace(row=name, label=config.label or name)]


def _experiment(
    rows: Sequence[Mapping[str, Any]],
    chosen: list[str],
    parsed: Mapping[str, Override],
    composer: Composer,
) -> list[ComposedRow]:
    only = [str(entry.value()) for entry in parsed.values() if _key(entry) == "row"]
    names = [str(row["name"]) for row in rows]
    if only and only[0] not in names:
        raise unknown(f"row of {' '.join(chosen)}", only[0], names)
    if len(set(names)) < len(names):
        raise LoraqError(f"{' '.join(chosen)}: two rows have the same name; rename one.")
    parsed = {override: entry for override, entry in parsed.items() if _key(entry) != "row"}
    for override, entry in parsed.items():
        if _key(entry) in ("method", "label"):
            raise LoraqError(
                f"{override} cannot be combined with {' '.join(chosen)}: the rows of the "
                f"experiment set the {_key(entry)}. Leave one of them out."
            )
    composed_rows, used = [], set(chosen)
    for row, name in zip(rows, names, strict=True):
        own = [*chosen, *row["overrides"]]
        _parse_overrides(row["overrides"], composer)
        plain = composer.compose(own)[
            "quant"
        ]  # without the user's overrides, to find which of them apply
        branch = plain is not None and plain["branch"]["kind"] != "none"
        wanted = _applying(parsed, plain is not None, branch)
        used |= set(wanted)
        composed = composer.compose([*own, *(o for o in wanted if o not in chosen)])
        converted = _convert(composed, f"row '{name}' of {' '.join(chosen)}")
        composed_rows.append(converted.replace(row=name, label=str(row["label"])))
    unused = [override for override in parsed if override not in used]
    if unused:
        raise LoraqError(
            f"{unused[0]} has no effect on any row of {' '.join(chosen)}; leave it out."
        )
    if not any(row.config.quant is None for row in composed_rows):
        composed_rows.insert(0, _reference(composed_rows[0]))
    if only:
        composed_rows = [
            row for row in composed_rows if row.config.quant is None or row.config.row == only[0]
        ]
    return sorted(composed_rows, key=lambda row: row.config.quant is not None)


def _reference(row: ComposedRow) -> ComposedRow:
    """The 16-bit reference of a quantised row."""
    return row.replace(method="reference", quant=None, row="reference", label="16-bit")


def _applying(parsed: Mapping[str, Override], quantised: bool, branch: bool) -> list[str]:
    """The overrides that have an effect on a row with(out) quantisation or branch."""
    kept = []
    for override, entry in parsed.items():
        key = _key(entry)
        if not quantised and (key == "transform" or key.startswith("quant.") or "@quant." in key):
            continue
        if not branch and key.startswith(_BRANCH_KEYS):
            continue
        kept.append(override)
    return kept


def _convert(composed: dict[str, Any], where: str) -> ComposedRow:
    written = {name: value for name, value in composed.items() if name != "rows"}
    try:
        return ComposedRow(checked_config(resolve_interpolations(written)), written)
    except LoraqError as error:
        raise LoraqError(f"{error}\n  (in {where})") from None


def _key(entry: Override) -> str:
    """The key of an override: `quant.seed`, `method`, `format@quant.weight`."""
    package = entry.package
    return entry.key_or_group + (f"@{package}" if package is not None else "")


def _parse_overrides(overrides: Sequence[str], composer: Composer) -> dict[str, Override]:
    """Parse the overrides; an unknown group, option or key raises LoraqError with near matches."""
    known = config_groups()
    keys: list[str] | None = None
    parsed = {}
    for override in overrides:
        entry = composer.parse(override)
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
            if value is None:
                raise LoraqError(
                    f"{override}: a group needs an option. Leave it out for the default, or set "
                    f"one of {', '.join(known[name])}."
                )
            if str(value) not in known[name]:
                raise LoraqError(f"{override}: {unknown(name, str(value), known[name])}")
            continue
        if keys is None:
            keys = _flatten(composer.compose([]))
        if name not in keys:
            guess = did_you_mean(near_matches(name, [*keys, *known]))
            raise LoraqError(
                f"{override}: unknown setting '{name}'.{guess}\n"
                "  conf/config.yaml and its groups contain all settings with their defaults."
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


def checked_config(composed: Mapping[str, Any]) -> Config:
    """Convert a composed configuration to a validated `Config`; LoraqError names the setting."""
    plain = {name: value for name, value in composed.items() if name != "rows"}
    config: Config = from_plain(Config, plain)
    if config.quant is not None:
        config.quant.formats()
        if is_user_file(config.quant.branch.kind):
            user_file_label(config.quant.branch.kind)  # raises if the file does not exist
    for name in config.metrics.names:
        try:
            find_metric(name)
        except LoraqError as error:
            raise LoraqError(f"metrics.names: {error}") from None
    return config
