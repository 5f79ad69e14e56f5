"""CLEVRER's world: what can be in a video, and the records that hold one video's ground truth.

Source: Yi et al., "CLEVRER: CoLlision Events for Video REpresentation and Reasoning", ICLR 2020, and the released
files (http://data.csail.mit.edu/clevrer/, CC0): 20,000 videos of 128 frames, 480x320, 25 frames/s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float64, Int64

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
