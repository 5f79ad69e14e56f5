"""Exact labels of one video from its annotation and the fixed camera: what supervises, and what is measured against.

Nothing here is estimated: boxes, masks, flow and visibility come from rays cast at the annotated primitives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from data.camera import Camera
from data.raycast import Hits, Scene, cast, rigid_flow
from data.world import MAX_OBJECTS, Annotation

#: The columns of ``VideoLabels.states``. World units; ``vx vy vz`` in world units per simulated second as annotated;
#: the yaw of the heading as sine and cosine (continuous through a full turn); ``yaw_rate`` in radians per second.
STATES: Final = ("x", "y", "z", "vx", "vy", "vz", "sin_yaw", "cos_yaw", "yaw_rate")


@dataclass(frozen=True)
class VideoLabels:
    """Labels of the kept frames of one video on the grid (h, w). Slot k = the k-th smallest ``object_id``; slots
    without an object hold zeros, and n = `MAX_OBJECTS` always.

    - ``boxes``: (x0, y0, x1, y1) around the visible pixels of each object, in pixels of (h, w), x1 and y1 exclusive
      (pixel j covers [j, j+1)); zeros where nothing of it is visible.
    - ``presence``: 1 where at least one pixel of the object is visible.
    - ``states``: columns `STATES`; known for annotated objects even when out of view.
    - ``collision``: 1 when an annotated collision falls after the previous kept frame and not after this one, so
      none is lost between kept frames; ``collision_pairs`` says which (symmetric). The first kept frame takes only
      those annotated on itself.
    - ``instances``: 0 on the background, k + 1 on object slot k.
    - ``flow_fwd[k]`` lives on kept frame k and points to k+1; ``flow_bwd[k]`` lives on k+1 and points to k; channel
      0 is dx (right), 1 is dy (down), in pixels of (h, w). Zero on the background.
    - ``visible[k]`` lives on the grid of k+1: 1 where the surface seen there was visible in frame k.
    """

    boxes: Float32[np.ndarray, "t n 4"]
    presence: UInt8[np.ndarray, "t n"]
    states: Float32[np.ndarray, "t n d"]
    collision: UInt8[np.ndarray, " t"]
    collision_pairs: UInt8[np.ndarray, "t n n"]
    instances: UInt8[np.ndarray, "t h w"]
    flow_fwd: Float32[np.ndarray, "t-1 2 h w"]
    flow_bwd: Float32[np.ndarray, "t-1 2 h w"]
    visible: UInt8[np.ndarray, "t-1 h w"]


def label_video(
    annotation: Annotation, frames: Sequence[int], height: int, width: int, *, device: torch.device | str = "cpu"
) -> VideoLabels:
    """All labels of one video at the kept ``frames`` (ascending indices of the annotation) for an image size.

    Raises ValueError when no frame is given or the frames do not ascend, IndexError outside the annotation.
    """
    kept = [int(t) for t in frames]
    if not kept or any(b <= a for a, b in pairwise(kept)):
        raise ValueError(f"frames must be at least one ascending index, not {kept}")
    scene = Scene.of(annotation, kept, device)
    camera = Camera.clevrer(height, width)
    hits = cast(scene, camera)
    flow = rigid_flow(scene, camera, hits)
    boxes, presence = visible_boxes(hits, len(annotation.properties))
    collision, pairs = collisions(annotation, kept)
    return VideoLabels(
        boxes=_slots(boxes),
        presence=_slots(presence),
        states=_slots(states(annotation, kept)),
        collision=collision,
        collision_pairs=pairs,
        instances=(hits.instance + 1).to(torch.uint8).cpu().numpy(),
        flow_fwd=flow.fwd.cpu().numpy(),
        flow_bwd=flow.bwd.cpu().numpy(),
        visible=flow.visible.to(torch.uint8).cpu().numpy(),
    )


def visible_boxes(hits: Hits, n: int) -> tuple[Float32[np.ndarray, "t n 4"], UInt8[np.ndarray, "t n"]]:
    """Boxes around the visible pixels of ``n`` objects (exclusive ends, zeros where absent), and their presence."""
    t = hits.instance.shape[0]
    boxes, presence = np.zeros((t, n, 4), dtype=np.float32), np.zeros((t, n), dtype=np.uint8)
    for k in range(n):
        mine = hits.instance == k
        x0, x1 = _extent(mine.any(dim=1))
        y0, y1 = _extent(mine.any(dim=2))
        presence[:, k] = (x1 > 0).cpu().numpy()
        boxes[:, k] = torch.stack([x0, y0, x1, y1], dim=-1).cpu().numpy()
    return boxes, presence


def _extent(occupied: Tensor) -> tuple[Tensor, Tensor]:
    """First and one past the last occupied position of each row; both zero in an empty row."""
    length = occupied.shape[1]
    flags = occupied.to(torch.uint8)
    some = occupied.any(dim=1)
    first, last = flags.argmax(dim=1), length - flags.flip(1).argmax(dim=1)
    return torch.where(some, first, 0), torch.where(some, last, 0)


def states(annotation: Annotation, frames: Sequence[int]) -> Float32[np.ndarray, "t n 9"]:
    """The columns `STATES` of each annotated object at the kept frames."""
    index = np.asarray(frames)
    yaw = annotation.orientation[index, :, 2]
    spin = annotation.angular_velocity[index, :, 2]
    columns = [np.sin(yaw), np.cos(yaw), spin]
    parts = [annotation.location[index], annotation.velocity[index], np.stack(columns, axis=-1)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def collisions(
    annotation: Annotation, frames: Sequence[int]
) -> tuple[UInt8[np.ndarray, " t"], UInt8[np.ndarray, "t n n"]]:
    """Whether, and between which slots, something collides in (previous kept frame, this kept frame]."""
    slots = {int(object_id): k for k, object_id in enumerate(annotation.object_ids)}
    pairs = np.zeros((len(frames), MAX_OBJECTS, MAX_OBJECTS), dtype=np.uint8)
    for c in annotation.collisions:
        t = int(np.searchsorted(frames, c.frame))
        if t == len(frames) or (t == 0 and c.frame != frames[0]):
            continue
        a, b = (slots[k] for k in c.object_ids)
        pairs[t, a, b] = pairs[t, b, a] = 1
    return pairs.max(axis=(1, 2)), pairs


def _slots(values: np.ndarray) -> np.ndarray:
    """Pads the object axis (1) with zeros to `MAX_OBJECTS`."""
    width = [(0, 0)] * values.ndim
    width[1] = (0, MAX_OBJECTS - values.shape[1])
    return np.pad(values, width)
