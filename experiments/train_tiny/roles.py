"""Put the embedded models' weights and inputs side by side, per role of a layer.

    python -m experiments.train_tiny.roles          # after inspect_weights of every model

Reads `record/NAME_weights.csv` of the embedded models and `record/published.csv`, what papers print
of PixArt-Σ, SANA and FLUX; writes `record/roles.csv` and the tables of `docs/small_models.md`.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from loraq.utils.files import write_text

from .settings import ASSETS, MODELS, RECORD, ROOT

PAGE = ROOT / "docs" / "small_models.md"
MARK = "<!-- {} by experiments.train_tiny.roles -->"
MEANS = (
    "top16",
    "top16_random",
    "half",
    "kurtosis",
    "max_over_rms",
    "activation_outlier",
    "channel_outlier",
)
TITLES = {
    "model": "model",
    "role": "role",
    "layers": "layers",
    "top16": "energy in 16 directions",
    "top16_random": "Gaussian",
    "half": "directions of half the energy",
    "kurtosis": "kurtosis",
    "max_over_rms": "largest weight / rms",
    "activation_outlier": "input: largest / rms of a token",
    "channel_outlier": "largest channel / rms",
}
SHARES = ("top16", "top16_random", "half")


def by_role(model: str, rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Return one row per role, the means over its layers, in the order of the model."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["role"], []).append(row)
    made = []
    for role, members in groups.items():
        means = {k: sum(float(m[k]) for m in members) / len(members) for k in MEANS}
        made.append(
            {"model": model, "role": role, "layers": str(len(members))}
            | {k: f"{v:.4f}" if k in SHARES else f"{v:.2f}" for k, v in means.items()}
        )
    return made


def layers(record: Path) -> dict[str, list[dict[str, str]]]:
    """Return the recorded weights tables of the embedded models, by model."""
    found = {}
    for name in MODELS:
        table = record / f"{name}_weights.csv"
        if table.exists() and (ASSETS / name).exists():
            with table.open(encoding="utf-8", newline="") as stream:
                found[name] = list(csv.DictReader(stream))
    return found


def measured(record: Path) -> list[dict[str, str]]:
    """Return the rows of all embedded models whose weights table is recorded."""
    return [row for name, rows in layers(record).items() for row in by_role(name, rows)]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(cells) + " |" for cells in rows]
    head = list(head)
    return "\n".join(["| " + " | ".join(head) + " |", "|---" * len(head) + "|", *lines])


def measured_table(rows: list[dict[str, str]]) -> str:
    """Return the rows as a Markdown table, shares in percent."""

    def cell(key: str, value: str) -> str:
        return f"{float(value):.0%}" if key in SHARES else value

    return _table(TITLES.values(), ([cell(k, row[k]) for k in TITLES] for row in rows))


def over_models(record: Path) -> dict[str, str]:
    """Return, for the texts of `published.csv`, each quantity of all embedded models in words.

    Means over the layers; NAME_max is the largest layer, gain what SVDQuant adds to round to
    nearest (PSNR) in the committed tables.
    """
    texts: dict[str, list[str]] = {}
    for name, rows in layers(record).items():
        for key in MEANS:
            values = [float(row[key]) for row in rows]
            for end, value in (("", sum(values) / len(values)), ("_max", max(values))):
                text = f"{value:.0%}" if key in SHARES else f"{value:.1f}"
                texts.setdefault(key + end, []).append(f"{text} ({name})")
        table = ROOT / "results" / ("table1" if name == "tiny_pixart" else f"table1-{name}")
        if (table / "main.csv").exists():
            with (table / "main.csv").open(encoding="utf-8", newline="") as stream:
                psnr = {row["row"]: row["PSNR"] for row in csv.DictReader(stream)}
            gain = float(psnr["SVDQuant, 16-bit branch"]) - float(psnr["RTN"])
            texts.setdefault("gain", []).append(f"{gain:+.1f} ({name})")
    return {key: ", ".join(parts) for key, parts in texts.items()}


def published_table(record: Path) -> str:
    """Return what papers print, as a Markdown table with its sources."""
    words = over_models(record)
    with (record / "published.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    return _table(
        ("model", "printed", "the embedded models", "source"),
        ([r["model"], r["printed"], r["embedded"].format(**words), r["source"]] for r in rows),
    )


def filled(page: str, tables: dict[str, str]) -> str:
    """Return the page with the text between its marks replaced by the tables."""
    for name, table in tables.items():
        start, end = MARK.format(name), MARK.format(f"end of {name}")
        before, rest = page.split(start)
        page = f"{before}{start}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    return page


def current(record: Path = RECORD) -> str:
    """Return the page as the records make it."""
    tables = {"measured": measured_table(measured(record)), "published": published_table(record)}
    return filled(PAGE.read_text(encoding="utf-8"), tables)


if __name__ == "__main__":
    rows = measured(RECORD)
    with (RECORD / "roles.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    write_text(PAGE, current())
    print(f"{RECORD / 'roles.csv'}\n{PAGE}")
