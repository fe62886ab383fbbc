"""Diagrams of an experiment as SVG that adapt to a light or dark colour scheme."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from loraq.results.plots.diagrams import draw_diagrams
from loraq.results.record import Record
from loraq.results.report.gallery import data_uri

TITLES = {
    "error_steps": "Output error over the denoising steps",
    "convergence": "Loss by round",
}
INK, NIGHT, DAY = "#000000", "#1b1f24", "#ffffff"
NIGHT_INK = "#e6e3dc"
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")


def svg_diagrams(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Return (title, data URI) of every diagram of the records except quality against memory."""
    with tempfile.TemporaryDirectory() as folder:
        paths = draw_diagrams(records, Path(folder), ".svg", pareto=False)
        drawn = [(path.stem, both_schemes(path.read_text(encoding="utf-8"))) for path in paths]
    return [
        (_title(stem, records), data_uri(text.encode(), "image/svg+xml")) for stem, text in drawn
    ]


def _title(stem: str, records: Sequence[Record]) -> str:
    labels = {f"allocation_{record.row}": record.label or record.row for record in records}
    if stem in labels:
        return f"Ranks and bits: {labels[stem]}"
    return TITLES.get(stem, stem.replace("_", " ").capitalize())


def both_schemes(svg: str) -> str:
    """Replace the colours of an SVG by CSS variables with a light and a dark value.

    An SVG with pixel images is returned unchanged, because their colours cannot be replaced.
    """
    head, opening, body = svg.partition("<svg ")
    if "<image " in body:
        return svg
    colours = sorted({INK, *_COLOUR.findall(body)})
    day = "".join(f"--c{colour[1:]}:{colour};" for colour in colours)
    night = "".join(f"--c{colour[1:]}:{at_night(colour)};" for colour in colours)
    style = (
        f"<style>svg{{{day}fill:var(--c{INK[1:]})}}"
        f"@media (prefers-color-scheme:dark){{svg{{{night}}}}}</style>"
    )
    attributes, closing, rest = body.partition(">")
    named = _COLOUR.sub(lambda match: f"var(--c{match[0][1:]})", rest)
    return head + opening + attributes + closing + style + named


def at_night(colour: str) -> str:
    """Return a colour for a dark background: greys are inverted, dark colours lightened."""
    if colour == DAY:
        return NIGHT
    if colour == INK:
        return NIGHT_INK
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    if max(red, green, blue) - min(red, green, blue) < 12:
        return f"#{f'{min(235, 270 - red):02x}' * 3}"
    light = (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255
    share = min(0.65, max(0.0, 0.7 - light))
    mixed = (round(part + (255 - part) * share) for part in (red, green, blue))
    return "#" + "".join(f"{part:02x}" for part in mixed)
