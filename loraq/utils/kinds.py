"""The kinds of output that a pipeline makes, one output for each prompt."""

from __future__ import annotations

from typing import Final, Literal

Kind = Literal["image", "video", "audio"]
UNITS: Final[dict[Kind, str]] = {"image": "images", "video": "videos", "audio": "clips"}
"""Kind → what several outputs are called in tables, messages and captions."""
SUFFIXES: Final[dict[Kind, str]] = {"image": ".png", "video": ".png", "audio": ".wav"}
"""Kind → the suffix of an output's file; a video is an animated PNG."""
BLANK: Final[dict[Kind, str]] = {
    "image": "have one colour only",
    "video": "have one colour only",
    "audio": "are silent",
}
"""Kind → what outputs of a failed model do."""
