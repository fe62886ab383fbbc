"""The sets of each kind of output, and which kind the files of a folder are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from loraq.errors import LoraqError
from loraq.metrics.common.audio_set import AudioSet
from loraq.metrics.common.image_set import ImageSet
from loraq.metrics.common.reading import video_shape
from loraq.metrics.common.video_set import VideoSet
from loraq.utils.kinds import UNITS, Kind

SETS: dict[Kind, type[ImageSet]] = {"image": ImageSet, "video": VideoSet, "audio": AudioSet}


def kind_of_file(path: Path) -> Kind:
    """What a file holds: sound if it is a WAV, a video if it is a PNG of several frames."""
    suffix = path.suffix.lower()
    if suffix == ".wav":
        return "audio"
    return "video" if suffix == ".png" and video_shape(path).frames > 1 else "image"


def set_of_folder(folder: Path, names: Sequence[str]) -> ImageSet:
    """The images, videos (animated PNG) or clips (WAV) of a folder, in the order of `names`.

    LoraqError if a name has no file, or if the files are of several kinds.
    """
    stems = set(names)
    if any(path.suffix.lower() == ".wav" and path.stem in stems for path in folder.iterdir()):
        return AudioSet.of_folder(folder, names)
    found = ImageSet.of_folder(folder, names)
    kinds = map(kind_of_file, found.paths)
    moving = [name for name, kind in zip(names, kinds, strict=True) if kind == "video"]
    if not moving:
        return found
    if len(moving) < len(names):
        still = next(name for name in names if name not in moving)
        raise LoraqError(
            f"'{folder}' has videos, such as '{moving[0]}', and images, such as '{still}'. Score "
            "them in folders of their own."
        )
    return VideoSet(found.paths, found.names)


def check_same_kind(images: ImageSet, reference: ImageSet) -> None:
    """LoraqError if images are compared with videos, or the like."""
    if images.KIND != reference.KIND:
        raise LoraqError(
            f"'{images.paths[0].parent}' holds {UNITS[images.KIND]}, "
            f"'{reference.paths[0].parent}' {UNITS[reference.KIND]}. Compare one kind with itself."
        )
