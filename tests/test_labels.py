"""Labels on scenes with known answers, and their agreement with one another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.camera import Camera, project_points
from data.clevrer import MAX_OBJECTS, Annotation, Collision, ObjectProperty
from data.labels import STATES, VideoLabels, label_video

T, H, W = 9, 80, 120


def annotation() -> Annotation:
    """A sphere crossing to the right in front of a cube at rest, and a cylinder that is never in view."""
    location = np.zeros((T, 3, 3))
    location[:, 0] = [0.0, 0.0, 0.2]
    location[:, 1, 0], location[:, 1, 1], location[:, 1, 2] = 0.7, np.linspace(-0.8, 0.8, T), 0.2
    location[:, 2] = [0.0, 9.0, 0.2]
    orientation = np.zeros((T, 3, 3))
    orientation[:, 0, 2] = 0.6
    orientation[:, 2, 0] = np.pi / 2
    return Annotation(
        scene_index=3,
        properties=(
            ObjectProperty(1, "red", "metal", "cube"),
            ObjectProperty(4, "blue", "rubber", "sphere"),
            ObjectProperty(7, "gray", "rubber", "cylinder"),
        ),
        object_ids=np.array([1, 4, 7]),
        location=location,
        orientation=orientation,
        velocity=np.full((T, 3, 3), 0.5),
        angular_velocity=np.full((T, 3, 3), 0.25),
        inside_camera_view=np.ones((T, 3), dtype=bool),
        collisions=(
            Collision((1, 4), 3, (0.0, 0.0, 0.0)),
            Collision((7, 4), 4, (0.0, 0.0, 0.0)),
            Collision((1, 7), 8, (0.0, 0.0, 0.0)),
        ),
    )


@pytest.fixture(scope="module")
def labels() -> VideoLabels:
    return label_video(annotation(), range(T), H, W)


def test_shapes_types_and_empty_slots(labels: VideoLabels) -> None:
    n = MAX_OBJECTS
    expected = {
        "boxes": ((T, n, 4), np.float32),
        "presence": ((T, n), np.uint8),
        "states": ((T, n, len(STATES)), np.float32),
        "collision": ((T,), np.uint8),
        "collision_pairs": ((T, n, n), np.uint8),
        "instances": ((T, H, W), np.uint8),
        "flow_fwd": ((T - 1, 2, H, W), np.float32),
        "flow_bwd": ((T - 1, 2, H, W), np.float32),
        "visible": ((T - 1, H, W), np.uint8),
    }
    for name, (shape, dtype) in expected.items():
        array = getattr(labels, name)
        assert (name, array.shape, array.dtype) == (name, shape, dtype)
        assert np.isfinite(array).all()
    assert labels.presence[:, :2].all()
    assert not labels.presence[:, 2:].any()  # out of view, or no such object
    assert not labels.boxes[:, 2:].any()
    assert labels.states[:, 2].any()  # out of view, but known
    assert not labels.states[:, 3:].any()


def test_boxes_are_the_extents_of_the_instance_masks(labels: VideoLabels) -> None:
    for t, k in np.ndindex(T, 2):
        y, x = np.nonzero(labels.instances[t] == k + 1)
        assert labels.boxes[t, k].tolist() == [x.min(), y.min(), x.max() + 1, y.max() + 1]
    whole = labels.boxes[0, 0]
    assert (
        labels.boxes[4, 0, 3] < whole[3]
    )  # the passing sphere hides the bottom of the cube: boxes are of what is seen


def test_the_sphere_covers_its_projected_centre(labels: VideoLabels) -> None:
    centres = project_points(annotation().location[:, 1], Camera.clevrer(H, W))
    boxes = labels.boxes[:, 1]
    np.testing.assert_allclose((boxes[:, :2] + boxes[:, 2:]) / 2, centres, atol=0.8)
    for t, (x, y) in enumerate(centres):
        assert labels.instances[t, int(y), int(x)] == 2


def test_flow_points_from_where_it_lives(labels: VideoLabels) -> None:
    """The sphere moves right: forward flow is positive on frame k, backward flow negative on frame k+1."""
    step = np.diff(project_points(annotation().location[:, 1], Camera.clevrer(H, W)), axis=0)
    for k in range(T - 1):
        before, after = labels.instances[k] == 2, labels.instances[k + 1] == 2
        forward, backward = labels.flow_fwd[k][:, before], labels.flow_bwd[k][:, after]
        np.testing.assert_allclose(forward.mean(1), step[k], atol=0.3)
        np.testing.assert_allclose(backward.mean(1), -step[k], atol=0.3)
        assert not labels.flow_fwd[k][:, ~before].any()
        assert not labels.flow_bwd[k][:, ~after].any()


def test_what_the_sphere_uncovers_was_not_visible(labels: VideoLabels) -> None:
    for k in range(T - 1):
        uncovered = (labels.instances[k] == 2) & (labels.instances[k + 1] != 2)
        assert uncovered.any()
        assert not labels.visible[k][uncovered].any()
        untouched = (labels.instances[k] == 0) & (labels.instances[k + 1] == 0)
        assert labels.visible[k][untouched].all()
    assert labels.visible.mean() > 0.95


def test_states_are_the_annotation(labels: VideoLabels) -> None:
    a, columns = annotation(), {name: i for i, name in enumerate(STATES)}
    np.testing.assert_allclose(labels.states[:, :3, :3], a.location, atol=1e-6)
    np.testing.assert_allclose(labels.states[:, :3, 3:6], 0.5)
    np.testing.assert_allclose(labels.states[:, 0, columns["sin_yaw"]], np.sin(0.6), rtol=1e-6)
    np.testing.assert_allclose(labels.states[:, 0, columns["cos_yaw"]], np.cos(0.6), rtol=1e-6)
    np.testing.assert_allclose(labels.states[:, :3, columns["yaw_rate"]], 0.25)


@pytest.mark.parametrize(
    ("frames", "expected"),
    [
        (range(9), {3: (0, 1), 4: (1, 2), 8: (0, 2)}),
        (range(0, 9, 2), {2: None, 4: (0, 2)}),  # frames 3 and 4 both fall into (2, 4]
        ((0, 3, 6), {1: (0, 1), 2: (1, 2)}),  # 8 lies after the last kept frame
        ((4, 8), {0: (1, 2), 1: (0, 2)}),  # 3 lies before the first
    ],
)
def test_no_collision_is_lost_between_kept_frames(
    frames: tuple[int, ...], expected: dict[int, tuple[int, int] | None]
) -> None:
    labels = label_video(annotation(), frames, 16, 24)
    assert np.nonzero(labels.collision)[0].tolist() == list(expected)
    assert (labels.collision_pairs == labels.collision_pairs.transpose(0, 2, 1)).all()
    for t, pair in expected.items():
        found = np.argwhere(np.triu(labels.collision_pairs[t])).tolist()
        assert found == ([[0, 1], [1, 2]] if pair is None else [list(pair)])


def test_labels_of_kept_frames_do_not_depend_on_the_others(labels: VideoLabels) -> None:
    some = label_video(annotation(), (2, 5), H, W)
    np.testing.assert_array_equal(some.instances, labels.instances[[2, 5]])
    np.testing.assert_array_equal(some.boxes, labels.boxes[[2, 5]])
    np.testing.assert_array_equal(some.states, labels.states[[2, 5]])


def test_one_frame_has_no_flow_and_bad_frames_are_refused() -> None:
    one = label_video(annotation(), [4], 16, 24)
    assert one.flow_fwd.shape == (0, 2, 16, 24)
    assert one.visible.shape == (0, 16, 24)
    for frames in ([], [3, 3], [5, 2]):
        with pytest.raises(ValueError, match="ascending"):
            label_video(annotation(), frames, 16, 24)
    with pytest.raises(IndexError, match=r"0\.\.9"):
        label_video(annotation(), [0, 9], 16, 24)


def test_labelling_leaves_no_trace_of_the_thread_count() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = label_video(annotation(), range(T), H, W)
        torch.set_num_threads(2)
        two = label_video(annotation(), range(T), H, W)
    finally:
        torch.set_num_threads(before)
    for name in ("instances", "flow_fwd", "flow_bwd", "visible", "boxes"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name), err_msg=name)
