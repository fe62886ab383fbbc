"""Captions outside the training distribution of the embedded models: other styles and sentences.

A training caption is a name and a category ("lobster, animal marine"). These captions are sentences
of a style, a subject and a place, so words, grammar, length and meaning are new to the model. Its
images of them are poor; they test how closely a quantised model follows the 16-bit model.
"""

from __future__ import annotations

STYLES = (
    "a watercolour painting of",
    "a grainy black and white photograph of",
    "an ink sketch of",
    "a pixel art scene with",
    "an oil painting in the manner of the old masters showing",
    "a blueprint of",
    "a neon poster of",
    "a child's crayon drawing of",
)
THINGS = (
    "two astronauts",
    "a rusty lighthouse",
    "an old violin and a teacup",
    "a crowd of penguins",
    "three stacked suitcases",
    "a cathedral made of glass",
    "a bearded sailor mending a net",
    "a chessboard with one king left",
)
PLACES = ("at night in the rain", "under a purple sky")


def outside_captions() -> list[dict]:
    """Return all 128 combinations, ordered so that every prefix mixes styles and subjects."""
    made = []
    for number in range(len(STYLES) * len(THINGS) * len(PLACES)):
        turn, style = divmod(number, len(STYLES))
        place, shift = divmod(turn, len(THINGS))
        thing = (style + shift) % len(THINGS)
        prompt = f"{STYLES[style]} {THINGS[thing]} {PLACES[place]}"
        made.append({"name": f"outside_{number:03d}", "prompt": prompt, "seen": False})
    return made
