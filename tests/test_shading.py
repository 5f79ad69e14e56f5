"""Rendered pictures: motion that labels explain, the look of released frames, light and materials."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.camera import Camera
from data.clevrer import COLORS, HEIGHT, WIDTH, Annotation, Color, Material, ObjectProperty, Shape, read_annotation
from data.labels import label_video
from data.shading import empty_ground, render, to_bytes, to_linear

SAMPLE = Path(__file__).resolve().parents[2] / "shared" / "clevrer"


def moving(material: Material = "rubber") -> Annotation:
    """Three shapes sliding, one turning, one passing in front of another."""
    kinds: tuple[tuple[Shape, Color], ...] = (("sphere", "blue"), ("cube", "red"), ("cylinder", "yellow"))
    start = np.array([[0.6, -0.6, 0.2], [-0.3, 0.4, 0.2], [1.2, 0.7, 0.2]])
    step = np.array([[0.02, 0.06, 0], [0.03, -0.04, 0], [-0.05, -0.04, 0]])
    time = np.arange(4)[:, None, None]
    turn = np.zeros((4, 3, 3))
    turn[:, 1, 2] = 0.3 + 0.04 * np.arange(4)
    turn[:, 2, 0] = np.pi / 2
    return Annotation(
        scene_index=0,
        properties=tuple(ObjectProperty(k, c, material, s) for k, (s, c) in enumerate(kinds)),
        object_ids=np.arange(3),
        location=start + time * step,
        orientation=turn,
        velocity=np.zeros((4, 3, 3)),
        angular_velocity=np.zeros((4, 3, 3)),
        inside_camera_view=np.ones((4, 3), dtype=bool),
        collisions=(),
    )


def warped(frame: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """Bilinear look-up of every pixel's source, written out with indices."""
    h, w = frame.shape[:2]
    y, x = np.mgrid[:h, :w]
    sx, sy = np.clip(x + flow[0], 0, w - 1), np.clip(y + flow[1], 0, h - 1)
    x0, y0 = np.minimum(sx.astype(int), w - 2), np.minimum(sy.astype(int), h - 2)
    ax, ay = (sx - x0)[..., None], (sy - y0)[..., None]
    f = frame.astype(np.float64)
    top = f[y0, x0] * (1 - ax) + f[y0, x0 + 1] * ax
    bottom = f[y0 + 1, x0] * (1 - ax) + f[y0 + 1, x0 + 1] * ax
    return top * (1 - ay) + bottom * ay


def eroded(mask: np.ndarray, pixels: int) -> np.ndarray:
    grown = F.max_pool2d(torch.from_numpy(~mask).float()[None], 2 * pixels + 1, stride=1, padding=pixels)
    return grown[0].numpy() == 0


@pytest.mark.parametrize("material", ["rubber", "metal"])
def test_true_backward_flow_makes_the_next_frame_and_forward_flow_does_not(material: Material) -> None:
    a = moving(material)
    frames, labels = render(a, range(4), HEIGHT, WIDTH), label_video(a, range(4), HEIGHT, WIDTH)
    right, wrong = [], []
    for k in range(3):
        good = labels.visible[k].astype(bool)
        bodies = np.zeros_like(good)
        for slot in (1, 2, 3):
            bodies |= eroded((labels.instances[k + 1] == slot) & good, 3)
        assert bodies.sum() > 1000
        for flow, errors in ((labels.flow_bwd[k], right), (labels.flow_fwd[k], wrong)):
            error = np.abs(warped(frames[k], flow) - frames[k + 1]).mean(-1)
            errors.append((error[bodies].mean(), error[(labels.instances[k + 1] > 0) & good].mean()))
            if errors is right:
                still = (labels.instances[k] == 0) & (labels.instances[k + 1] == 0)
                assert error[still].mean() < 0.5  # only shadows move there
    inner, whole = np.mean(right, axis=0)
    assert inner <= 2.0
    assert np.mean(wrong, axis=0)[1] > 2.5 * whole


def test_rubber_and_metal_differ() -> None:
    rubber, metal = (render(moving(m), [0], HEIGHT, WIDTH)[0] for m in ("rubber", "metal"))
    sphere = label_video(moving(), [0], HEIGHT, WIDTH).instances[0] == 1
    dull, shiny = rubber[sphere].mean(-1), metal[sphere].mean(-1)
    assert shiny.max() > dull.max() + 60  # lamps mirrored
    assert shiny.std() > 1.5 * dull.std()
    np.testing.assert_allclose(np.median(rubber[sphere], axis=0), COLORS["blue"], atol=15)


def test_objects_darken_the_ground_beside_them_only() -> None:
    frame = render(moving(), [0], HEIGHT, WIDTH)[0].astype(int)
    empty = to_bytes(empty_ground(Camera.clevrer())).numpy().astype(int)
    ground = label_video(moving(), [0], HEIGHT, WIDTH).instances[0] == 0
    away = eroded(ground, 2)
    loss = (empty - frame).mean(-1)
    assert loss[away].max() > 15
    assert loss[away].min() >= 0
    assert (loss[away] <= 1).mean() > 0.7
    assert (frame[:40, :100] == empty[:40, :100]).all()


def test_edges_are_smooth() -> None:
    frame = render(moving(), [0], HEIGHT, WIDTH)[0].astype(int)
    mask = label_video(moving(), [0], HEIGHT, WIDTH).instances[0] == 1
    edge = mask & ~eroded(mask, 1)
    blue = np.array(COLORS["blue"])
    assert (np.abs(frame[edge] - blue).max(-1) > 20).mean() > 0.2  # mixtures with the ground


def test_frames_do_not_depend_on_their_batch() -> None:
    a = moving()
    np.testing.assert_array_equal(render(a, range(4), 64, 96)[2], render(a, [2], 64, 96)[0])
    assert render(a, [], 64, 96).shape == (0, 64, 96, 3)


def test_light_round_trips() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_bytes(to_linear(levels / 255)), levels)


@pytest.mark.real
def test_pictures_look_like_released_frames() -> None:
    """Mean absolute difference to real frames 2.1 gray levels, of which noise and compression are about 1.1."""
    path = SAMPLE / "videos/train/video_01000-02000/video_01000.mp4"
    if not path.is_file():
        pytest.skip(f"the real CLEVRER sample is not at {SAMPLE}")
    import decord

    frames = [20, 60, 100]
    real = decord.VideoReader(str(path), num_threads=1).get_batch(frames).asnumpy().astype(int)
    a = read_annotation(SAMPLE / "annotations/train/annotation_01000-02000/annotation_01000.json")
    ours = render(a, frames, HEIGHT, WIDTH).astype(int)
    assert np.abs(ours - real).mean() < 3
    instances = label_video(a, frames, HEIGHT, WIDTH).instances
    for k, p in enumerate(a.properties):
        mask = np.stack([eroded(i == k + 1, 3) for i in instances])
        if mask.sum() > 300:
            difference = np.median(ours[mask], axis=0) - np.median(real[mask], axis=0)
            assert np.abs(difference).max() < 30, p
