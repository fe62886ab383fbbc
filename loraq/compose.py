"""Overrides → rows: composes and checks the configuration of every row of an experiment.

An experiment is a list of rows with overrides; each row becomes one `Config`, and all rows are
checked before anything runs. Without an experiment there are two rows: the 16-bit reference and the
configuration of the overrides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from loraq.config import Config, ExperimentRow, Recipe
from loraq.config.by_hydra import resolve_interpolations
from loraq.config.composition import Composer
from loraq.config.convert import from_plain
from loraq.config.overrides import override_key, parse_overrides
from loraq.errors import LoraqError, unknown
from loraq.metrics.registry import AUTO, find_metric, names_for
from loraq.models.defaults import with_defaults
from loraq.models.family import recipe_for
from loraq.models.outputs import output_kind
from loraq.utils.assets import CONF
from loraq.utils.texts import list_of_texts
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


def load_rows(
    overrides: Sequence[str], *, of_model: bool = True, composer: Composer | None = None
) -> list[Config]:
    """The rows of a command in order, including the 16-bit reference.

    of_model: fill what is left to the model: its own settings that are null, `metrics=auto`, and
        in recipes `skip=None`, `sixteen_bit=model`.
    composer: shared by many calls, so that each file is read once.
    LoraqError for an invalid override.
    """
    rows = [row.config for row in compose_rows(overrides, composer)]
    return [_with_model(row) for row in rows] if of_model else rows


def recipe(method: str, *overrides: str) -> Recipe:
    """The recipe of a preset in `conf/method/`, with overrides as on the command line.

    `recipe("loraq_o2", "format@quant.branch_weight=int4", "quant.branch.budget=0.32")`

    Without an override `quant.skip=[…]`, its `skip` is None: quantising uses the model family's
    list; `sixteen_bit=model` too is resolved there.
    """
    found = load_rows([f"method={method}", *overrides], of_model=False)[-1].quant
    if found is None:
        raise LoraqError(
            f"method={method} is the 16-bit model and has no recipe. Use a method that quantises, "
            "such as loraq_o2, svdquant or rtn."
        )
    return found


def _with_model(row: Config) -> Config:
    row = replace(row, model=with_defaults(row.model))
    if AUTO in row.metrics.names:
        names = names_for(row.metrics.names, output_kind(row.model))
        row = replace(row, metrics=replace(row.metrics, names=names))
    if row.quant is None:
        return row
    return replace(row, quant=recipe_for(row.quant, row.model.family, row.model.dtype))


def compose_rows(overrides: Sequence[str], composer: Composer | None = None) -> list[ComposedRow]:
    """The rows, each with its plain data."""
    composer = composer or Composer(CONF)
    listed = [override for override in list_of_texts(overrides, "overrides") if override]
    parsed = parse_overrides(listed, composer)
    chosen = [o for o, entry in parsed.items() if override_key(entry) == "experiment"]
    composed = composer.compose(chosen)
    if not isinstance(composed.get("experiment"), str):
        raise LoraqError(
            f"{' '.join(chosen)}: the file does not set `experiment`. Begin it with the line "
            "'# @package _global_', and write settings as KEY: VALUE (experiments/README.md)."
        )
    rows = composed.get("rows")
    if rows is None:
        return _single(parsed, composer)
    return _experiment(_read_rows(rows, " ".join(chosen)), chosen, parsed, composer)


def _read_rows(rows: Any, where: str) -> list[ExperimentRow]:
    """The rows of an experiment's file; LoraqError for anything but a list of distinct rows."""
    if not isinstance(rows, list) or not rows:
        raise LoraqError(
            f"{where}: rows={rows!r} must be a list. Write rows: and below it, for each row, "
            "- {name: NAME, label: LABEL, overrides: [KEY=VALUE]}."
        )
    found: dict[str, ExperimentRow] = {}
    for number, row in enumerate(rows, 1):
        try:
            made = from_plain(ExperimentRow, row, f"rows[{number}]")
        except LoraqError as error:
            raise LoraqError(f"{where}: {error}") from None
        if made.name.casefold() in found:
            other = found[made.name.casefold()].name
            raise LoraqError(
                f"{where}: the names of two rows, '{other}' and '{made.name}', are the same"
                + (" in folders that ignore capitals" if made.name != other else "")
                + ". Rename one."
            )
        found[made.name.casefold()] = made
    return list(found.values())


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
        if any(override_key(entry) == "quant.branch.kind" for entry in parsed.values()):
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
    rows: Sequence[ExperimentRow],
    chosen: list[str],
    parsed: Mapping[str, Override],
    composer: Composer,
) -> list[ComposedRow]:
    only = [str(entry.value()) for entry in parsed.values() if override_key(entry) == "row"]
    names = [row.name for row in rows]
    if only and only[0] not in names:
        raise unknown(f"row of {' '.join(chosen)}", only[0], names)
    parsed = {override: entry for override, entry in parsed.items() if override_key(entry) != "row"}
    for override, entry in parsed.items():
        if override_key(entry) in ("method", "label"):
            raise LoraqError(
                f"{override} cannot be combined with {' '.join(chosen)}: the rows of the "
                f"experiment set the {override_key(entry)}. Leave one of them out."
            )
    composed_rows, used = [], set(chosen)
    for row in rows:
        own = [*chosen, *row.overrides]
        parse_overrides(row.overrides, composer)
        composed = composer.compose(own)  # alone, to find which of the user's overrides apply
        plain = composed["quant"]
        branch = plain is not None and plain["branch"]["kind"] != "none"
        wanted = [o for o in _applying(parsed, plain is not None, branch) if o not in chosen]
        if wanted:
            used |= set(wanted)
            composed = composer.compose([*own, *wanted])
        converted = _convert(composed, f"row '{row.name}' of {' '.join(chosen)}")
        composed_rows.append(converted.replace(row=row.name, label=row.label))
    unused = [override for override in parsed if override not in used]
    if unused:
        raise LoraqError(
            f"{unused[0]} has no effect on any row of {' '.join(chosen)}; leave it out."
        )
    if not any(row.config.quant is None for row in composed_rows):
        composed_rows.insert(0, _reference(composed_rows[0]))
    baseline, known = composed_rows[0].config.baseline, [row.config.row for row in composed_rows]
    if baseline is not None and baseline not in known:
        raise unknown(f"baseline of {' '.join(chosen)}", baseline, map(str, known))
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
        key = override_key(entry)
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


def checked_config(composed: Mapping[str, Any]) -> Config:
    """Convert a composed configuration to a validated `Config`; LoraqError names the setting."""
    config: Config = from_plain(Config, composed)
    if config.quant is not None:
        config.quant.for_model(config.model.dtype).formats()
        if is_user_file(config.quant.branch.kind):
            user_file_label(config.quant.branch.kind)  # raises if the file does not exist
    for name in filter(AUTO.__ne__, config.metrics.names):
        try:
            find_metric(name)
        except LoraqError as error:
            raise LoraqError(f"metrics.names: {error}") from None
    return config
