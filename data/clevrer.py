"""CLEVRER's world: what can be in a video, how its annotations are written and where its files lie.

Source: Yi et al., "CLEVRER: CoLlision Events for Video REpresentation and Reasoning", ICLR 2020, and the released
files (http://data.csail.mit.edu/clevrer/, CC0): 20,000 videos of 128 frames, 480x320, 25 frames/s.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64, Int64

from data.errors import AnnotationError, SourceError

Shape = Literal["sphere", "cylinder", "cube"]
Color = Literal["gray", "red", "blue", "green", "brown", "cyan", "purple", "yellow"]
Material = Literal["metal", "rubber"]
Split = Literal["train", "validation", "test"]

SHAPES: Final[tuple[Shape, ...]] = get_args(Shape)
MATERIALS: Final[tuple[Material, ...]] = get_args(Material)
#: sRGB of each colour as released videos show it on rubber in full light (medians over its pixels; CLEVR's palette
#: is more saturated, the renderer's tone curve is not).
COLORS: Final[dict[Color, tuple[int, int, int]]] = {
    "gray": (86, 85, 83),
    "red": (119, 54, 53),
    "blue": (59, 78, 127),
    "green": (48, 89, 38),
    "brown": (103, 77, 42),
    "cyan": (61, 131, 128),
    "purple": (100, 54, 119),
    "yellow": (136, 132, 62),
}
MAX_OBJECTS: Final = 8
FPS: Final = 25
FRAMES: Final = 128
HEIGHT: Final = 320
WIDTH: Final = 480
#: First id and one past the last id of each official split.
SPLITS: Final[dict[Split, tuple[int, int]]] = {
    "train": (0, 10000),
    "validation": (10000, 15000),
    "test": (15000, 20000),
}
#: Items of the official set that are quarantined by name, with the reason.
KNOWN_BAD: Final[dict[int, str]] = {
    7648: "its published object proposals cover 104 frames instead of 128",
    8182: "it shows 8 objects, more than the 6 that CLEVRER places",
    9777: "its published object proposals cover 104 frames instead of 128",
    10800: "its annotation is broken in the official archive",
    18700: "it shows 8 objects, more than the 6 that CLEVRER places",
}
_BROKEN_FILE: Final = "download the annotation again, or leave this video out of the selected ids"


@dataclass(frozen=True)
class ObjectProperty:
    """What one object looks like, for the whole video."""

    object_id: int
    color: Color
    material: Material
    shape: Shape


@dataclass(frozen=True)
class Collision:
    """Two objects touch in a frame (0-based, at full frame rate) at a place in world units."""

    object_ids: tuple[int, int]
    frame: int
    location: tuple[float, float, float]


@dataclass(frozen=True)
class Annotation:
    """One video's ground truth, objects ordered by ascending ``object_id`` along every ``n`` axis.

    World units: the ground is z = 0, every object is about 0.4 high. ``velocity`` is in world units per second of
    the simulation, of which one frame is 0.0279 (location step = 0.0279 x velocity); ``angular_velocity`` is in
    radians per the same second. ``orientation`` holds XYZ Euler angles in radians (R = Rz Ry Rx); an upright
    cylinder reads (pi/2, 0, yaw) because its mesh lies along y.
    """

    scene_index: int
    properties: tuple[ObjectProperty, ...]
    object_ids: Int64[np.ndarray, " n"]
    location: Float64[np.ndarray, "t n 3"]
    orientation: Float64[np.ndarray, "t n 3"]
    velocity: Float64[np.ndarray, "t n 3"]
    angular_velocity: Float64[np.ndarray, "t n 3"]
    inside_camera_view: Bool[np.ndarray, "t n"]
    collisions: tuple[Collision, ...]

    @property
    def frames(self) -> int:
        return self.location.shape[0]


def read_annotation(path: Path | str) -> Annotation:
    """Reads and checks one annotation file in CLEVRER's schema.

    Raises AnnotationError (path, field, value, remedy) when the file is absent, is not JSON, lacks a field, holds a
    value of the wrong type or range, misses a frame or an object, or names an object that is not in
    ``object_property``. Objects may come in any order: they are matched by ``object_id``.
    """
    reader = _Reader(Path(path))
    return reader.annotation()


def write_annotation(annotation: Annotation, path: Path | str) -> None:
    """Writes CLEVRER's schema, key for key and digit for digit (4 decimals, one line), atomically.

    Reading an official file and writing it again gives the same bytes.
    """
    path = Path(path)
    document = {
        "scene_index": annotation.scene_index,
        "video_filename": f"video_{annotation.scene_index:05d}.mp4",
        "object_property": [
            {"object_id": p.object_id, "color": p.color, "material": p.material, "shape": p.shape}
            for p in annotation.properties
        ],
        "motion_trajectory": [
            {
                "frame_id": t,
                "objects": [
                    {
                        "object_id": int(object_id),
                        "location": _rounded(annotation.location[t, k]),
                        "orientation": _rounded(annotation.orientation[t, k]),
                        "velocity": _rounded(annotation.velocity[t, k]),
                        "angular_velocity": _rounded(annotation.angular_velocity[t, k]),
                        "inside_camera_view": bool(annotation.inside_camera_view[t, k]),
                    }
                    for k, object_id in enumerate(annotation.object_ids)
                ],
            }
            for t in range(annotation.frames)
        ],
        "collision": [
            {"object_ids": list(c.object_ids), "frame_id": c.frame, "location": _rounded(np.asarray(c.location))}
            for c in annotation.collisions
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(document, allow_nan=False), encoding="utf-8")
    partial.replace(path)


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 4) for v in values]


class _Reader:
    """One file being read: knows its path, so that every complaint can name it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def fail(self, field: str, value: object, expected: str) -> AnnotationError:
        shown = repr(value)
        shown = shown if len(shown) <= 120 else shown[:117] + "..."
        return AnnotationError(f"{self.path}: {field} is {shown}, expected {expected}", remedy=_BROKEN_FILE)

    def annotation(self) -> Annotation:
        document = self.load()
        scene_index = self.integer(document, "scene_index", "")
        properties = self.properties(document)
        ids = [p.object_id for p in properties]
        trajectory = self.sequence(document, "motion_trajectory", "")
        n, t = len(ids), len(trajectory)
        if t == 0:
            raise self.fail("motion_trajectory", trajectory, "one entry per frame")
        motion = np.empty((4, t, n, 3))
        inside = np.empty((t, n), dtype=bool)
        seen: set[int] = set()
        for i, frame in enumerate(trajectory):
            where = f"motion_trajectory[{i}]"
            k = self.integer(frame, "frame_id", where)
            if not 0 <= k < t or k in seen:
                raise self.fail(f"{where}.frame_id", k, f"each of 0..{t - 1} once")
            seen.add(k)
            self.frame(frame, where, ids, motion[:, k], inside[k])
        return Annotation(
            scene_index=scene_index,
            properties=properties,
            object_ids=np.asarray(ids, dtype=np.int64),
            location=motion[0],
            orientation=motion[1],
            velocity=motion[2],
            angular_velocity=motion[3],
            inside_camera_view=inside,
            collisions=self.collisions(document, ids, t),
        )

    def load(self) -> dict[str, Any]:
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise AnnotationError(
                f"{self.path}: there is no such annotation (test videos have none)",
                remedy="select ids of train or validation, or complete the download",
            ) from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise AnnotationError(f"{self.path}: cannot be read as JSON ({error})", remedy=_BROKEN_FILE) from error
        if not isinstance(document, dict):
            raise self.fail("the document", document, "a JSON object")
        return document

    def properties(self, document: dict[str, Any]) -> tuple[ObjectProperty, ...]:
        found: dict[int, ObjectProperty] = {}
        for i, entry in enumerate(self.sequence(document, "object_property", "")):
            where = f"object_property[{i}]"
            object_id = self.integer(entry, "object_id", where)
            if object_id in found:
                raise self.fail(f"{where}.object_id", object_id, "an id that occurs once")
            for field, allowed in (("color", tuple(COLORS)), ("material", MATERIALS), ("shape", SHAPES)):
                if self.value(entry, field, where) not in allowed:
                    raise self.fail(f"{where}.{field}", entry[field], f"one of {', '.join(allowed)}")
            found[object_id] = ObjectProperty(object_id, entry["color"], entry["material"], entry["shape"])
        if not 1 <= len(found) <= MAX_OBJECTS:
            raise self.fail("object_property", f"{len(found)} objects", f"1 to {MAX_OBJECTS} objects")
        return tuple(found[k] for k in sorted(found))

    def frame(self, frame: Any, where: str, ids: list[int], motion: np.ndarray, inside: np.ndarray) -> None:
        slots = {object_id: k for k, object_id in enumerate(ids)}
        for j, entry in enumerate(self.sequence(frame, "objects", where)):
            place = f"{where}.objects[{j}]"
            object_id = self.integer(entry, "object_id", place)
            slot = slots.pop(object_id, None)
            if slot is None:
                raise self.fail(f"{place}.object_id", object_id, f"each of {ids} once")
            for row, field in enumerate(("location", "orientation", "velocity", "angular_velocity")):
                motion[row, slot] = self.vector(entry, field, place)
            visible = self.value(entry, "inside_camera_view", place)
            if not isinstance(visible, bool):
                raise self.fail(f"{place}.inside_camera_view", visible, "true or false")
            inside[slot] = visible
        if slots:
            raise self.fail(f"{where}.objects", f"without object_id {sorted(slots)}", f"each of {ids} once")

    def collisions(self, document: dict[str, Any], ids: list[int], t: int) -> tuple[Collision, ...]:
        found = []
        for i, entry in enumerate(self.sequence(document, "collision", "")):
            where = f"collision[{i}]"
            pair = self.value(entry, "object_ids", where)
            valid = isinstance(pair, list) and len(pair) == 2 and all(k in ids for k in pair) and pair[0] != pair[1]
            if not valid:
                raise self.fail(f"{where}.object_ids", pair, f"two different ids of {ids}")
            frame = self.integer(entry, "frame_id", where)
            if not 0 <= frame < t:
                raise self.fail(f"{where}.frame_id", frame, f"a frame of 0..{t - 1}")
            x, y, z = self.vector(entry, "location", where)
            found.append(Collision((int(pair[0]), int(pair[1])), frame, (x, y, z)))
        return tuple(found)

    def value(self, mapping: Any, field: str, where: str) -> Any:
        if not isinstance(mapping, dict):
            raise self.fail(where, mapping, "a JSON object")
        if field not in mapping:
            raise self.fail(f"{where}.{field}".lstrip("."), "absent", f"a key among {sorted(mapping)}")
        return mapping[field]

    def integer(self, mapping: Any, field: str, where: str) -> int:
        value = self.value(mapping, field, where)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(f"{where}.{field}".lstrip("."), value, "an integer")
        return value

    def sequence(self, mapping: Any, field: str, where: str) -> list[Any]:
        value = self.value(mapping, field, where)
        if not isinstance(value, list):
            raise self.fail(f"{where}.{field}".lstrip("."), value, "a list")
        return value

    def vector(self, mapping: Any, field: str, where: str) -> tuple[float, float, float]:
        value = self.value(mapping, field, where)
        numbers = isinstance(value, list) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        if not numbers or len(value) != 3 or not np.isfinite(value).all():
            raise self.fail(f"{where}.{field}", value, "three finite numbers")
        return float(value[0]), float(value[1]), float(value[2])


# --- where files lie ---------------------------------------------------------------------------------------------


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


def _layout(kind: str, split: Split, video_id: int, suffix: str) -> PurePosixPath:
    first = video_id // 1000 * 1000
    folder = f"{kind}_{first:05d}-{first + 1000:05d}"
    return PurePosixPath(f"{kind}s", split, folder, f"{kind}_{video_id:05d}.{suffix}")


_MEMBER: Final = re.compile(r"(?P<kind>video|annotation)_(?P<id>\d{5})\.(?P<suffix>mp4|json)")
_SUFFIX: Final = {"video": "mp4", "annotation": "json"}


def member_id(name: str, kind: Literal["video", "annotation"]) -> int | None:
    """The id in a file or archive member's name (``.../video_00012.mp4`` -> 12); None if it is no such member."""
    match = _MEMBER.fullmatch(PurePosixPath(name).name)
    if match is None or match["kind"] != kind or match["suffix"] != _SUFFIX[kind]:
        return None
    return int(match["id"])


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
