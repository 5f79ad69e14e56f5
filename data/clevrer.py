"""The CLEVRER data set: where its files lie, and the one place to import its world and its annotations from.

What is in a video stands in `data.world`, the annotation files in `data.annotation`.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final, Literal

from data.annotation import read_annotation, write_annotation
from data.errors import SourceError
from data.world import (
    COLORS,
    FPS,
    FRAMES,
    HEIGHT,
    KNOWN_BAD,
    MATERIALS,
    MAX_OBJECTS,
    SHAPES,
    SPLITS,
    WIDTH,
    Annotation,
    Collision,
    Color,
    Material,
    ObjectProperty,
    Shape,
    Split,
)

__all__ = [
    "COLORS",
    "FPS",
    "FRAMES",
    "HEIGHT",
    "KNOWN_BAD",
    "MATERIALS",
    "MAX_OBJECTS",
    "SHAPES",
    "SPLITS",
    "WIDTH",
    "Annotation",
    "Collision",
    "Color",
    "FoundVideo",
    "Kind",
    "Material",
    "ObjectProperty",
    "Shape",
    "Split",
    "annotation_path",
    "discover",
    "member_id",
    "official_split",
    "parse_ids",
    "proposal_path",
    "read_annotation",
    "video_path",
    "write_annotation",
]


Kind = Literal["video", "annotation", "proposal"]


@dataclass(frozen=True)
class FoundVideo:
    """One video on disk, with its annotation where there is one."""

    id: int
    video: Path
    annotation: Path | None


def official_split(video_id: int) -> Split:
    """The split that the official numbering gives an id. Raises ValueError outside 0..19999."""
    for split, (first, end) in SPLITS.items():
        if first <= video_id < end:
            return split
    raise ValueError(f"video id {video_id} is outside CLEVRER's 0..{SPLITS['test'][1] - 1}")


def video_path(split: Split, video_id: int) -> PurePosixPath:
    """``videos/train/video_00000-01000/video_00000.mp4``: the official layout, relative to the data set's root."""
    return _layout("video", split, video_id, "mp4")


def annotation_path(split: Split, video_id: int) -> PurePosixPath:
    """``annotations/train/annotation_00000-01000/annotation_00000.json``, relative to the data set's root."""
    return _layout("annotation", split, video_id, "json")


def proposal_path(split: Split, video_id: int) -> PurePosixPath:
    """``proposals/train/proposal_00000-01000/proposal_00000.json``, relative to the data set's root."""
    return _layout("proposal", split, video_id, "json")


def _layout(kind: Kind, split: Split, video_id: int, suffix: str) -> PurePosixPath:
    first = video_id // 1000 * 1000
    folder = f"{kind}_{first:05d}-{first + 1000:05d}"
    return PurePosixPath(f"{kind}s", split, folder, f"{kind}_{video_id:05d}.{suffix}")


# Released proposals go by two names.
_MEMBER: Final[dict[Kind, re.Pattern[str]]] = {
    "video": re.compile(r"video_([0-9]{5})\.mp4"),
    "annotation": re.compile(r"annotation_([0-9]{5})\.json"),
    "proposal": re.compile(r"(?:proposal|sim)_([0-9]{5})\.json"),
}


def member_id(name: str, kind: Kind) -> int | None:
    """The id in a file or archive member's name (``.../video_00012.mp4`` -> 12); None if it is no such member."""
    match = _MEMBER[kind].fullmatch(PurePosixPath(name).name)
    return int(match[1]) if match else None


def discover(root: Path | str) -> list[FoundVideo]:
    """Every video below ``root``, at any depth, by ascending id. Links are followed; hidden folders are not entered.

    Raises SourceError when ``root`` is absent, holds no video, or holds two files for one id.
    """
    root = Path(root)
    layout = f"point the source at a folder that holds {video_path('train', 0)} or the like"
    if not root.is_dir():
        raise SourceError(f"{root}: there is no such folder", remedy=layout)
    videos: dict[int, Path] = {}
    annotations: dict[int, Path] = {}
    for folder, children, names in os.walk(root, followlinks=True):
        children[:] = sorted(c for c in children if not c.startswith((".", "__MACOSX")))
        for name in sorted(names):
            for k, members in ((member_id(name, "video"), videos), (member_id(name, "annotation"), annotations)):
                if k is None:
                    continue
                if k in members:
                    both = f"{members[k]} and {Path(folder, name)}"
                    raise SourceError(f"id {k:05d} exists twice: {both}", remedy="keep one of the two")
                members[k] = Path(folder, name)
    if not videos:
        raise SourceError(f"{root}: no file named video_NNNNN.mp4 at any depth", remedy=layout)
    return [FoundVideo(k, path, annotations.get(k)) for k, path in sorted(videos.items())]


def parse_ids(text: str) -> tuple[int, ...]:
    """``"0-8,10,1000"`` -> (0, 1, ..., 8, 10, 1000): ranges include both ends, the result ascends.

    Raises ValueError naming the part at fault: not a number or range, a range that descends, an id above 99999
    (file names have five digits) or an id given twice.
    """
    ids: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"{part!r} in ids {text!r} is neither a number nor a range such as 0-8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"{part!r} in ids {text!r} descends: write {last}-{first}")
        if last > 99999:
            raise ValueError(f"{part!r} in ids {text!r} is above 99999: file names have five digits")
        again = ids.intersection(range(first, last + 1))
        if again:
            raise ValueError(f"{part!r} in ids {text!r} repeats id {min(again)}")
        ids.update(range(first, last + 1))
    return tuple(sorted(ids))
