"""The camera: known answers, an independent formula, scaling, and the real pictures it was measured on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data.camera import Camera, project_points

RNG = np.random.default_rng(0)


def by_hand(point: np.ndarray, camera: Camera) -> tuple[float, float]:
    """The pinhole written out with angles: yaw about world z, then pitch down to the origin."""
    cx, cy, cz = camera.position
    x, y, z = point - np.array([cx, cy, cz])
    yaw = np.arctan2(-cy, -cx)
    ahead, left = x * np.cos(yaw) + y * np.sin(yaw), -x * np.sin(yaw) + y * np.cos(yaw)
    pitch = np.arctan2(cz, np.hypot(cx, cy))
    depth, up = ahead * np.cos(pitch) - z * np.sin(pitch), ahead * np.sin(pitch) + z * np.cos(pitch)
    return camera.center[0] - camera.focal[0] * left / depth, camera.center[1] - camera.focal[1] * up / depth


def test_projection_agrees_with_the_formula_by_angles() -> None:
    camera = Camera.clevrer()
    points = RNG.uniform([-4, -4, 0], [3, 4, 1], (50, 3))
    np.testing.assert_allclose(project_points(points, camera), [by_hand(p, camera) for p in points], atol=1e-6)


def test_known_answers() -> None:
    camera = Camera.clevrer()
    origin, right, near = project_points(np.array([[0.0, 0, 0], [0, 0.5, 0], [0.5, 0, 0]]), camera)
    np.testing.assert_allclose(origin, camera.center, atol=1e-4)
    assert right[0] > origin[0] + 40  # image right is +y
    assert near[1] > origin[1] + 20  # image down is +x
    depth = camera.project(torch.zeros(3, dtype=torch.float64))[1]
    assert depth.item() == pytest.approx(np.linalg.norm(camera.position))


def test_it_agrees_with_the_published_ground_homography() -> None:
    """A homography fitted to hand-checked correspondences of released videos, in index coordinates."""
    homography = np.array(
        [[-42.72345, 107.49779, 239.72799], [25.49675, -0.05597, 141.83692], [-0.1774, -0.00041, 1.0]]
    )
    ground = RNG.uniform([-2.5, -1.8], [1.5, 1.8], (200, 2))
    uvw = np.column_stack([ground, np.ones(200)]) @ homography.T
    ours = project_points(np.column_stack([ground, np.full(200, 0.2)]), Camera.clevrer()) - 0.5
    assert np.median(np.linalg.norm(ours - uvw[:, :2] / uvw[:, 2:], axis=1)) < 1.0


def test_rays_undo_the_projection() -> None:
    camera = Camera.clevrer(64, 96)
    points = torch.from_numpy(RNG.uniform([-4, -4, 0], [3, 4, 1], (50, 3)))
    pixels, depth = camera.project(points)
    back = torch.tensor(camera.position, dtype=torch.float64) + depth[:, None] * camera.rays(pixels)
    torch.testing.assert_close(back, points)


def test_resolutions_scale_from_the_corner_not_from_pixel_centres() -> None:
    points = RNG.uniform([-4, -2, 0], [3, 2, 1], (20, 3))
    full, half = project_points(points, Camera.clevrer()), project_points(points, Camera.clevrer(160, 120))
    np.testing.assert_allclose(half, full * [120 / 480, 160 / 320], atol=1e-9)


def test_pixel_centres_and_containment() -> None:
    camera = Camera.clevrer(2, 3)
    centres = camera.pixel_centers(torch.zeros(1))
    assert centres.shape == (2, 3, 2)
    assert centres[1, 2].tolist() == [2.5, 1.5]
    inside = camera.contains(torch.tensor([[0.0, 0.0], [2.9, 1.9], [3.0, 0.0], [0.0, 2.0], [-0.1, 1.0]]))
    assert inside.tolist() == [True, True, False, False, False]
