"""CLEVRER's camera: one fixed pinhole without roll, the same in every video.

The constants were measured on released videos and annotations; ``benchmarks/camera_fit.py`` prints how closely they
fit. Image coordinates are continuous and count from the corner of the image: pixel (row i, column j)
covers [j, j+1) x [i, i+1) and its centre is (j + 0.5, i + 0.5). So coordinates scale between resolutions by
width/width alone; `numpy` and `torch` index coordinates are these minus one half.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.world import HEIGHT, WIDTH

#: Depths below this are behind the camera or in its lens: clamped in projections.
NEAR = 0.05


@dataclass(frozen=True)
class Camera:
    """A pinhole at ``position`` (world units) looking at the origin, world z up, image right about world +y.

    ``focal`` is (x, y) in pixels of (height, width); ``center`` is the principal point (x, y) in the same
    coordinates (see the module's text). `clevrer` gives CLEVRER's at any resolution.
    """

    height: int
    width: int
    position: tuple[float, float, float]
    focal: tuple[float, float]
    center: tuple[float, float]

    @classmethod
    def clevrer(cls, height: int = HEIGHT, width: int = WIDTH) -> Camera:
        """CLEVRER's camera, measured at 480x320, for frames resized to (height, width)."""
        sx, sy = width / WIDTH, height / HEIGHT
        return cls(
            height=height,
            width=width,
            position=POSITION,
            focal=(FOCAL * sx, FOCAL * sy),
            center=(CENTER[0] * sx, CENTER[1] * sy),
        )

    def axes(self, like: Tensor) -> Float[Tensor, "3 3"]:
        """Rows: image right, image down and forward as unit vectors of the world."""
        position = torch.tensor(self.position, dtype=torch.float64)
        forward = -position / position.norm()
        right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
        right = right / right.norm()
        return torch.stack([right, torch.linalg.cross(forward, right), forward]).to(like)

    def in_camera(self, points: Float[Tensor, "*s 3"]) -> Float[Tensor, "*s 3"]:
        """World points as (right, down, depth) seen from the camera, world units."""
        return (points - _vector(self.position, points)) @ self.axes(points).T

    def project(self, points: Float[Tensor, "*s 3"]) -> tuple[Float[Tensor, "*s 2"], Float[Tensor, "*s"]]:
        """World points -> image coordinates (x right, y down; see the module's text) and depth along the axis.

        Points behind the camera keep their (negative) depth and land on coordinates without meaning.
        """
        seen = self.in_camera(points)
        depth = seen[..., 2]
        pixels = seen[..., :2] / depth.clamp(min=NEAR)[..., None]
        return pixels * _vector(self.focal, points) + _vector(self.center, points), depth

    def rays(self, pixels: Float[Tensor, "*s 2"]) -> Float[Tensor, "*s 3"]:
        """Image coordinates -> world directions scaled so that ``position + depth * ray`` lies at that depth."""
        plane = (pixels - _vector(self.center, pixels)) / _vector(self.focal, pixels)
        right, down, forward = self.axes(pixels)
        return plane[..., :1] * right + plane[..., 1:] * down + forward

    def pixel_centers(self, like: Tensor) -> Float[Tensor, "h w 2"]:
        ys = torch.arange(self.height, device=like.device, dtype=like.dtype) + 0.5
        xs = torch.arange(self.width, device=like.device, dtype=like.dtype) + 0.5
        return torch.stack(torch.meshgrid(xs, ys, indexing="xy"), dim=-1)

    def contains(self, pixels: Float[Tensor, "*s 2"]) -> Bool[Tensor, "*s"]:
        """Whether image coordinates fall on the picture."""
        x, y = pixels.unbind(-1)
        return (x >= 0) & (x < self.width) & (y >= 0) & (y < self.height)


def _vector(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)


#: World units, pixels of 480x320, image coordinates of 480x320.
POSITION = (4.316, 0.0, 2.497)
FOCAL = 523.5
CENTER = (240.05, 160.35)


def project_points(points: Float[np.ndarray, "*s 3"], camera: Camera) -> Float[np.ndarray, "*s 2"]:
    """`Camera.project` for arrays: image coordinates only."""
    return camera.project(torch.from_numpy(points))[0].numpy()
