"""CLEVRER's annotation files: read strictly, written digit for digit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Final

import numpy as np

from data.errors import AnnotationError
from data.world import COLORS, MATERIALS, MAX_OBJECTS, SHAPES, Annotation, Collision, ObjectProperty

_BROKEN_FILE: Final = "download the annotation again, or leave this video out of the selected ids"


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
