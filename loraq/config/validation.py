"""Settings with their limits beside them: what every configuration dataclass is built from."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from typing import Any

from loraq.errors import LoraqError, unknown
from loraq.utils.user_module import is_own_file


def setting(
    default: Any,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    only_for: tuple[str, ...] = (),
    since: str = "",
) -> Any:
    """A field with limits; None is always allowed where the annotation says so.

    default: `dataclasses.MISSING` where every use must give the value.

    only_for: the values of the group's main choice that read this setting; elsewhere it would have
        no effect, and any value but the default is refused.
    since: the release that brought the setting; at its default it stays out of the keys of
        products, so that those of earlier releases are still found.
    """
    limits = {"at_least": at_least, "above": above, "below": below}
    return field(default=default, metadata={**limits, "only_for": only_for, "since": since})


def choice(
    *options: str, only_for: tuple[str, ...] = (), since: str = "", own_file: bool = False
) -> Any:
    """A field with one of these values; the first is the default.

    own_file: or the path of a Python file of the user's own, which may read every setting.
    """
    metadata = {"choices": options, "only_for": only_for, "since": since, "own_file": own_file}
    return field(default=options[0], metadata=metadata)


class Checked:
    """Checks the limits of a dataclass's own fields as it is made."""

    def __post_init__(self) -> None:
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            value, limits = getattr(self, entry.name), entry.metadata
            own = limits.get("own_file") and is_own_file(value)
            if "choices" in limits and value not in limits["choices"] and not own:
                problem = unknown(entry.name, str(value), limits["choices"])
                raise LoraqError(f"{entry.name}: {problem}")
            if value is None:
                continue
            least, above, below = (limits.get(n) for n in ("at_least", "above", "below"))
            if least is not None and value < least:
                raise LoraqError(
                    f"{entry.name}={value} is below the limit {least:g}. Give {least:g} or more."
                )
            if above is not None and not value > above:
                remedy = "a positive number" if above == 0 else f"more than {above:g}"
                raise LoraqError(f"{entry.name}={value} must be above {above:g}. Give {remedy}.")
            if below is not None and not value < below:
                raise LoraqError(
                    f"{entry.name}={value} must be below {below:g}. Give less than {below:g}."
                )

    def refuse_idle(self, main: str, group: str) -> None:
        """LoraqError for a setting that the group's main choice does not read."""
        chosen = getattr(self, main)
        if is_own_file(chosen):
            return
        for entry in dataclasses.fields(self):  # type: ignore[arg-type]
            readers = entry.metadata.get("only_for", ())
            value = getattr(self, entry.name)
            if readers and chosen not in readers and value != entry.default:
                raise LoraqError(
                    f"{entry.name}={value} has no effect with {main}={chosen}, only with "
                    f"{' or '.join(readers)}. Leave it out, or set {group}.{main}."
                )
