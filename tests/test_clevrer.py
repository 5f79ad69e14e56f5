"""CLEVRER's schema and layout: real files survive a round trip, broken ones say where they are broken."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.clevrer import (
    KNOWN_BAD,
    annotation_path,
    discover,
    member_id,
    official_split,
    parse_ids,
    read_annotation,
    video_path,
    write_annotation,
)
from data.errors import AnnotationError, SourceError

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "clevrer"


def document() -> dict[str, Any]:
    def item(k: int, x: float) -> dict[str, Any]:
        return {
            "object_id": k,
            "location": [x, 0.5, 0.2],
            "orientation": [0.0, -0.0, 0.1],
            "velocity": [1.0, 0.0, 0.0],
            "angular_velocity": [0.0, 0.0, 0.0],
            "inside_camera_view": True,
        }

    return {
        "scene_index": 7,
        "video_filename": "video_00007.mp4",
        "object_property": [
            {"object_id": 0, "color": "blue", "material": "rubber", "shape": "sphere"},
            {"object_id": 3, "color": "gray", "material": "metal", "shape": "cube"},
        ],
        "motion_trajectory": [{"frame_id": t, "objects": [item(0, 0.1 * t), item(3, 1.0)]} for t in range(3)],
        "collision": [{"object_ids": [0, 3], "frame_id": 1, "location": [0.1, 0.2, 0.2]}],
    }


def write(folder: Path, content: object) -> Path:
    path = folder / "annotation_00007.json"
    path.write_text(json.dumps(content))
    return path


def test_reads_every_field(tmp_path: Path) -> None:
    a = read_annotation(write(tmp_path, document()))
    assert a.scene_index == 7
    assert a.frames == 3
    assert a.object_ids.tolist() == [0, 3]
    assert [p.shape for p in a.properties] == ["sphere", "cube"]
    np.testing.assert_allclose(a.location[:, 0, 0], [0, 0.1, 0.2])
    assert a.location.shape == a.orientation.shape == a.velocity.shape == a.angular_velocity.shape == (3, 2, 3)
    assert a.inside_camera_view.all()
    assert a.collisions[0].object_ids == (0, 3)
    assert a.collisions[0].frame == 1


def test_objects_and_frames_are_indexed_by_id_not_by_order(tmp_path: Path) -> None:
    straight = read_annotation(write(tmp_path, document()))
    shuffled = document()
    shuffled["object_property"].reverse()
    shuffled["motion_trajectory"].reverse()
    for frame in shuffled["motion_trajectory"][::2]:
        frame["objects"].reverse()
    again = read_annotation(write(tmp_path, shuffled))
    assert again.properties == straight.properties
    np.testing.assert_array_equal(again.location, straight.location)


def test_round_trip_keeps_the_text(tmp_path: Path) -> None:
    path = write(tmp_path, document())
    before = path.read_text()
    write_annotation(read_annotation(path), tmp_path / "deep" / "copy.json")
    assert (tmp_path / "deep" / "copy.json").read_text() == before
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["copy.json"]


@pytest.mark.real
def test_real_annotations_survive_a_round_trip_byte_for_byte(tmp_path: Path) -> None:
    if not SAMPLE.is_dir():
        pytest.skip(f"the real CLEVRER sample is not at {SAMPLE}")
    paths = sorted(SAMPLE.rglob("annotation_*.json"))
    assert paths
    for path in paths:
        write_annotation(read_annotation(path), tmp_path / path.name)
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


BREAKAGES = {
    "collision": lambda d: d.update(collisions=d.pop("collision")),
    "object_property[1].color": lambda d: d["object_property"][1].update(color="pink"),
    "object_property[1].object_id": lambda d: d["object_property"][1].update(object_id=0),
    "motion_trajectory[2].frame_id": lambda d: d["motion_trajectory"][2].update(frame_id=1),
    "motion_trajectory[1].objects": lambda d: d["motion_trajectory"][1]["objects"].pop(),
    "motion_trajectory[0].objects[0].object_id": lambda d: d["motion_trajectory"][0]["objects"][0].update(object_id=9),
    "motion_trajectory[0].objects[1].location": lambda d: d["motion_trajectory"][0]["objects"][1].update(
        location=[0, float("nan"), 0]
    ),
    "motion_trajectory[0].objects[1].velocity": lambda d: d["motion_trajectory"][0]["objects"][1].update(
        velocity=[0.0, 1.0]
    ),
    "motion_trajectory[0].objects[1].inside_camera_view": lambda d: d["motion_trajectory"][0]["objects"][1].update(
        inside_camera_view="yes"
    ),
    "collision[0].object_ids": lambda d: d["collision"][0].update(object_ids=[0, 5]),
    "collision[0].frame_id": lambda d: d["collision"][0].update(frame_id=3),
    "scene_index": lambda d: d.update(scene_index="seven"),
}


@pytest.mark.parametrize("field", sorted(BREAKAGES))
def test_a_malformed_annotation_names_path_field_and_remedy(tmp_path: Path, field: str) -> None:
    broken = copy.deepcopy(document())
    BREAKAGES[field](broken)
    path = write(tmp_path, broken)
    with pytest.raises(AnnotationError) as caught:
        read_annotation(path)
    assert str(path) in caught.value.message
    assert f" {field} is " in caught.value.message
    assert caught.value.remedy


def test_absent_and_unreadable_files_are_annotation_errors(tmp_path: Path) -> None:
    with pytest.raises(AnnotationError, match="no such annotation"):
        read_annotation(tmp_path / "annotation_15000.json")
    for content in (b"{", b"\xff\xfe\x00", b"[]"):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(AnnotationError, match=r"bad\.json"):
            read_annotation(tmp_path / "bad.json")


def test_the_official_layout() -> None:
    assert str(video_path("train", 0)) == "videos/train/video_00000-01000/video_00000.mp4"
    assert (
        str(annotation_path("validation", 12345))
        == "annotations/validation/annotation_12000-13000/annotation_12345.json"
    )
    assert [official_split(k) for k in (0, 9999, 10000, 14999, 15000, 19999)] == [
        "train", "train", "validation", "validation", "test", "test",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="20000"):
        official_split(20000)
    assert all(official_split(k) and reason for k, reason in KNOWN_BAD.items())


def test_discover_finds_members_at_any_depth(tmp_path: Path) -> None:
    for name in (
        "a/b/video_00003.mp4",
        "video_00001.mp4",
        "x/annotation_00003.json",
        "a/video_1.mp4",
        ".t/video_00009.mp4",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = discover(tmp_path)
    assert [(f.id, f.video.name, f.annotation is None) for f in found] == [
        (1, "video_00001.mp4", True),
        (3, "video_00003.mp4", False),
    ]


def test_discover_refuses_nothing_and_doubles(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        discover(tmp_path / "absent")
    with pytest.raises(SourceError, match=r"video_NNNNN\.mp4"):
        discover(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "video_00001.mp4").touch()
    with pytest.raises(SourceError, match="exists twice"):
        discover(tmp_path)


def test_member_id() -> None:
    assert member_id("video_00000-01000/video_00012.mp4", "video") == 12
    assert member_id("video_00012.mp4", "annotation") is None
    assert member_id("video_00012.json", "video") is None
    assert member_id("video_00000-01000/", "video") is None


def test_parse_ids() -> None:
    assert parse_ids("0-8,10,1000") == (*range(9), 10, 1000)
    assert parse_ids(" 5 , 1 - 2") == (1, 2, 5)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither"),
        ("1,", "neither"),
        ("a-3", "'a-3'"),
        ("8-0", "descends"),
        ("1-3,2", "repeats id 2"),
        ("100000", "99999"),
    ],
)
def test_parse_ids_names_the_part_at_fault(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_ids(text)
