"""Rays cast at the annotated primitives: exact instances, depth, rigid flow and visibility of every pixel.

CLEVRER's objects are three primitives of known size at annotated poses, and its camera is fixed, so what a detector
and a flow network would estimate on other data is computed here. Works on any device; batched over all
(frame, object) pairs, whose rays are limited to their exact or circumscribed image boxes.

Motion is rigid. The rotation of a sphere and the spin of a cylinder about its axis cannot be observed on uniformly
coloured bodies, so `rigid_flow` leaves them out unless asked: a sphere's surface then translates with its centre,
and a cylinder turns only as far as its axis does. Highlights and shadows stay where the lights put them and follow
neither convention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from data.camera import NEAR, Camera
from data.world import SHAPES, Annotation

#: World units, measured against released videos (``benchmarks/camera_fit.py``).
SPHERE_RADIUS: Final = 0.1985
CYLINDER_RADIUS: Final = 0.1955
CYLINDER_HALF_HEIGHT: Final = 0.194
CUBE_HALF_EDGE: Final = 0.189
#: Local bounding boxes (half extents); a cylinder's axis is its local y.
EXTENTS: Final = {
    "sphere": (SPHERE_RADIUS, SPHERE_RADIUS, SPHERE_RADIUS),
    "cylinder": (CYLINDER_RADIUS, CYLINDER_HALF_HEIGHT, CYLINDER_RADIUS),
    "cube": (CUBE_HALF_EDGE, CUBE_HALF_EDGE, CUBE_HALF_EDGE),
}
#: A surface point counts as hidden only behind something nearer by more than this fraction of its depth
#: (about 1 cm of a 40 cm object): grazing points of a turning silhouette are not called occluded by themselves.
SLACK: Final = 0.002


@dataclass(frozen=True)
class Scene:
    """Poses of a video's objects at the chosen frames. ``rotation`` maps local to world directions."""

    shape: Int64[Tensor, " n"]
    position: Float[Tensor, "t n 3"]
    rotation: Float[Tensor, "t n 3 3"]

    @classmethod
    def of(cls, annotation: Annotation, frames: Sequence[int], device: torch.device | str = "cpu") -> Scene:
        """``frames`` index the annotation, in any stride or order. Raises IndexError outside it."""
        index = np.asarray(frames, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= annotation.frames):
            raise IndexError(f"frames {index.min()}..{index.max()} of an annotation with {annotation.frames} frames")
        shape = torch.tensor([SHAPES.index(p.shape) for p in annotation.properties], device=device)
        position = torch.from_numpy(annotation.location[index]).to(device, torch.float32)
        rotation = euler_to_matrix(torch.from_numpy(annotation.orientation[index])).to(device, torch.float32)
        return cls(shape, position, rotation)

    def __getitem__(self, frames: slice) -> Scene:
        return Scene(self.shape, self.position[frames], self.rotation[frames])


@dataclass(frozen=True)
class Hits:
    """What each pixel sees: ``instance`` is -1 on the background, else the object's index along n; ``depth`` is the
    distance along the optical axis in world units, infinite on the background."""

    instance: Int64[Tensor, "t h w"]
    depth: Float[Tensor, "t h w"]


@dataclass(frozen=True)
class RigidFlow:
    """True flow between consecutive frames, in pixels of (h, w), zero on the background.

    ``fwd[k]`` lives on frame k and points to k+1; ``bwd[k]`` lives on k+1 and points to k. ``visible[k]`` lives on
    the grid of k+1: True where the surface point seen there was inside the image and not occluded in frame k.
    """

    fwd: Float[Tensor, "p 2 h w"]
    bwd: Float[Tensor, "p 2 h w"]
    visible: Bool[Tensor, "p h w"]


def euler_to_matrix(angles: Float[Tensor, "*s 3"]) -> Float[Tensor, "*s 3 3"]:
    """XYZ Euler angles in radians, as CLEVRER writes them, to R = Rz Ry Rx (local to world)."""
    (sx, sy, sz), (cx, cy, cz) = angles.sin().unbind(-1), angles.cos().unbind(-1)
    rows = [
        torch.stack([cz * cy, cz * sy * sx - sz * cx, cz * sy * cx + sz * sx], dim=-1),
        torch.stack([sz * cy, sz * sy * sx + cz * cx, sz * sy * cx - cz * sx], dim=-1),
        torch.stack([-sy, cy * sx, cy * cx], dim=-1),
    ]
    return torch.stack(rows, dim=-2)


def cast(scene: Scene, camera: Camera) -> Hits:
    """The nearest object and its depth at the centre of every pixel."""
    t, n = scene.position.shape[:2]
    size = t * camera.height * camera.width
    depth = scene.position.new_full((size,), torch.inf)
    owner = torch.full((size,), n, device=depth.device)
    samples = box_samples(image_boxes(scene, camera), camera)
    if samples.pair.numel():
        z = intersect_pairs(scene, camera.position, samples.pair, camera.rays(samples.pixel))
        hit = torch.isfinite(z)
        flat, z, slot = samples.flat[hit], z[hit], samples.pair[hit] % n
        depth.scatter_reduce_(0, flat, z, "amin")
        first = z <= depth[flat]
        owner.scatter_reduce_(0, flat[first], slot[first], "amin")
    grid = (t, camera.height, camera.width)
    return Hits(torch.where(owner == n, -1, owner).view(grid), depth.view(grid))


def cast_at(
    scene: Scene, camera: Camera, frame: Int64[Tensor, " m"], pixel: Float[Tensor, "m 2"]
) -> tuple[Int64[Tensor, " m"], Float[Tensor, " m"]]:
    """`cast` for chosen image coordinates of chosen frames, on the picture or off it: object (or -1) and depth."""
    n = scene.position.shape[1]
    boxes = image_boxes(scene, camera)[frame]
    x, y = pixel[:, None, 0], pixel[:, None, 1]
    near = (x >= boxes[..., 0]) & (x <= boxes[..., 2]) & (y >= boxes[..., 1]) & (y <= boxes[..., 3])
    sample, slot = near.nonzero(as_tuple=True)
    z = torch.full(near.shape, torch.inf).to(pixel)
    z[sample, slot] = intersect_pairs(scene, camera.position, frame[sample] * n + slot, camera.rays(pixel[sample]))
    depth, owner = z.min(dim=1)
    return torch.where(torch.isfinite(depth), owner, -1), depth


def rigid_flow(scene: Scene, camera: Camera, hits: Hits, *, reduce_symmetry: bool = True) -> RigidFlow:
    """Exact flow both ways and visibility for consecutive frames of ``scene`` (any stride), from `cast`'s result."""
    t, h, w = hits.instance.shape
    fwd = hits.depth.new_zeros((t - 1, 2, h, w))
    bwd = torch.zeros_like(fwd)
    visible = torch.ones((t - 1, h, w), dtype=torch.bool, device=fwd.device)
    if t < 2:
        return RigidFlow(fwd, bwd, visible)
    turn = reduced_rotation(scene) if reduce_symmetry else relative_rotation(scene)

    k, y, x, _, offset = _carried(hits, scene, camera, turn, step=1)
    fwd[k, :, y, x] = offset

    k, y, x, target, offset = _carried(hits, scene, camera, turn.mT, step=-1)
    bwd[k - 1, :, y, x] = offset
    landed = torch.stack([x, y], dim=-1) + 0.5 + offset
    visible &= hits.instance[:-1] < 0  # a background point stays where it is: seen before iff nothing stood there
    visible[k - 1, y, x] = camera.contains(landed) & ~occluded(scene, camera, k - 1, target)
    return RigidFlow(fwd, bwd, visible)


def relative_rotation(scene: Scene) -> Float[Tensor, "p n 3 3"]:
    """World rotation that takes each object from frame k to k+1; exactly the identity for one that does not turn."""
    before, after = scene.rotation[:-1], scene.rotation[1:]
    same = (before == after).all(-1).all(-1)[..., None, None]
    return torch.where(same, torch.eye(3).to(before), after @ before.mT)


def reduced_rotation(scene: Scene) -> Float[Tensor, "p n 3 3"]:
    """`relative_rotation` without what symmetry hides: none for spheres, the shortest one between the axes for
    cylinders (Rodrigues' formula for unit vectors a, b: R = I + [v] + [v]^2 / (1 + a.b), v = a x b)."""
    turn = relative_rotation(scene)
    a, b = scene.rotation[:-1, :, :, 1], scene.rotation[1:, :, :, 1]
    v = torch.linalg.cross(a, b)
    zero = torch.zeros_like(v[..., 0])
    skew = torch.stack([zero, -v[..., 2], v[..., 1], v[..., 2], zero, -v[..., 0], -v[..., 1], v[..., 0], zero], dim=-1)
    skew = skew.unflatten(-1, (3, 3))
    eye = torch.eye(3).to(turn)
    shortest = eye + skew + skew @ skew / (1 + (a * b).sum(-1)).clamp(min=1e-6)[..., None, None]
    shape = scene.shape[None, :, None, None]
    turn = torch.where(shape == SHAPES.index("cylinder"), shortest, turn)
    return torch.where(shape == SHAPES.index("sphere"), eye, turn)


def _carried(
    hits: Hits, scene: Scene, camera: Camera, turn: Float[Tensor, "p n 3 3"], step: int
) -> tuple[Tensor, Tensor, Tensor, Float[Tensor, "m 3"], Float[Tensor, "m 2"]]:
    """Object pixels (frame, row, column), where their surface points are one frame on (step 1) or back (step -1),
    and by how many pixels the picture of the point moves. Written as differences: what rests moves by exact zeros."""
    seen = hits.instance[:-1] if step == 1 else hits.instance[1:]
    k, y, x = (seen >= 0).nonzero(as_tuple=True)
    slot = seen[k, y, x]
    pairwise = turn[k, slot]
    k = k if step == 1 else k + 1
    pixel = torch.stack([x, y], dim=-1) + 0.5
    point = torch.tensor(camera.position).to(pixel) + hits.depth[k, y, x, None] * camera.rays(pixel)
    arm = point - scene.position[k, slot]
    swing = ((pairwise - torch.eye(3).to(arm)) @ arm[..., None])[..., 0]
    target = point + swing + (scene.position[k + step, slot] - scene.position[k, slot])
    return k, y, x, target, camera.project(target)[0] - camera.project(point)[0]


def occluded(
    scene: Scene, camera: Camera, frame: Int64[Tensor, " m"], point: Float[Tensor, "m 3"]
) -> Bool[Tensor, " m"]:
    """Whether anything, the point's own body included, stands between the camera and world points of a frame.

    Exact (rays, not a depth buffer), up to `SLACK`.
    """
    pixel, depth = camera.project(point)
    return cast_at(scene, camera, frame, pixel)[1] < depth * (1 - SLACK)


# --- primitives ---------------------------------------------------------------------------------------------------


def intersect_pairs(
    scene: Scene,
    origin: tuple[float, float, float] | Float[Tensor, "m 3"],
    pair: Int64[Tensor, " m"],
    ray: Float[Tensor, "m 3"],
) -> Float[Tensor, " m"]:
    """Ray parameter at which each ray enters its object (``pair = frame * n + slot``); infinite where it misses."""
    n = scene.position.shape[1]
    start = torch.as_tensor(origin).to(ray).expand_as(ray)
    position, rotation = scene.position.flatten(0, 1), scene.rotation.flatten(0, 1)
    out = ray.new_full((ray.shape[0],), torch.inf)
    for code, shape in enumerate(SHAPES):
        chosen = (scene.shape[pair % n] == code).nonzero()[:, 0]
        if not chosen.numel():
            continue
        p = pair[chosen]
        o, d = start[chosen] - position[p], ray[chosen]
        if shape != "sphere":
            back = rotation[p].mT
            o, d = (back @ o[..., None])[..., 0], (back @ d[..., None])[..., 0]
        out[chosen] = _ENTRY[shape](o, d)
    return out


def _sphere(o: Float[Tensor, "m 3"], d: Float[Tensor, "m 3"]) -> Float[Tensor, " m"]:
    a, b = (d * d).sum(-1), (o * d).sum(-1)
    root = b * b - a * ((o * o).sum(-1) - SPHERE_RADIUS**2)
    entry = (-b - root.clamp(min=0).sqrt()) / a
    return torch.where((root > 0) & (entry > NEAR), entry, torch.inf)


def _slabs(o: Tensor, d: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """Parameters at which rays enter and leave |x| <= half along each of the given axes."""
    inverse = 1 / torch.where(d.abs() < 1e-9, 1e-9, d)
    a, b = (-half - o) * inverse, (half - o) * inverse
    return torch.minimum(a, b), torch.maximum(a, b)


def _cube(o: Float[Tensor, "m 3"], d: Float[Tensor, "m 3"]) -> Float[Tensor, " m"]:
    enter, leave = _slabs(o, d, CUBE_HALF_EDGE)
    entry = enter.amax(-1)
    return torch.where((entry < leave.amin(-1)) & (entry > NEAR), entry, torch.inf)


def _cylinder(o: Float[Tensor, "m 3"], d: Float[Tensor, "m 3"]) -> Float[Tensor, " m"]:
    enter, leave = _slabs(o[:, 1], d[:, 1], CYLINDER_HALF_HEIGHT)
    ox, oz, dx, dz = o[:, 0], o[:, 2], d[:, 0], d[:, 2]
    a, b = (dx * dx + dz * dz).clamp(min=1e-12), ox * dx + oz * dz
    root = b * b - a * (ox * ox + oz * oz - CYLINDER_RADIUS**2)
    half = root.clamp(min=0).sqrt()
    entry = torch.maximum(enter, (-b - half) / a)
    hit = (root > 0) & (entry < torch.minimum(leave, (-b + half) / a)) & (entry > NEAR)
    return torch.where(hit, entry, torch.inf)


_ENTRY: Final = {"sphere": _sphere, "cylinder": _cylinder, "cube": _cube}


# --- which rays to cast -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Pixels of (frame, object) pairs: the pair, the pixel's centre and its place in the flat (t h w) grid."""

    pair: Int64[Tensor, " m"]  # frame * n + slot
    pixel: Float32[Tensor, "m 2"]
    flat: Int64[Tensor, " m"]  # (frame * h + row) * w + column


def image_boxes(scene: Scene, camera: Camera) -> Float[Tensor, "t n 4"]:
    """Image boxes (x0, y0, x1, y1) that contain each object, not clipped to the picture: the projected corners of
    its local bounding box. Empty (x1 < x0) behind the camera, everything where it reaches the camera's plane."""
    extents = torch.tensor([EXTENTS[s] for s in SHAPES]).to(scene.position)[scene.shape]
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).to(extents)
    corners = extents[:, None] * signs  # n 8 3
    identity = (scene.shape == SHAPES.index("sphere"))[None, :, None, None]
    rotation = torch.where(identity, camera.axes(extents).T, scene.rotation)
    pixels, depth = camera.project(torch.einsum("tnij,nkj->tnki", rotation, corners) + scene.position[:, :, None])
    boxes = torch.cat([pixels.amin(-2), pixels.amax(-2)], dim=-1)
    everything = torch.tensor([-torch.inf, -torch.inf, torch.inf, torch.inf]).to(boxes)
    nothing = -everything
    boxes = torch.where(depth.amin(-1, keepdim=True) < NEAR, everything, boxes)
    return torch.where(depth.amax(-1, keepdim=True) < NEAR, nothing, boxes)


def box_samples(boxes: Float[Tensor, "t n 4"], camera: Camera) -> Samples:
    """The pixels whose centres lie inside each (frame, object) pair's image box, as one flat list."""
    h, w = camera.height, camera.width
    x0, y0, x1, y1 = (boxes.flatten(0, 1)[:, i].clamp(0, end).round().long() for i, end in enumerate((w, h, w, h)))
    wide, count = (x1 - x0).clamp(min=0), (x1 - x0).clamp(min=0) * (y1 - y0).clamp(min=0)
    pair = torch.repeat_interleave(count)
    within = torch.arange(pair.shape[0], device=pair.device) - (count.cumsum(0) - count)[pair]
    columns = within % wide[pair] + x0[pair]
    rows = within // wide[pair] + y0[pair]
    frame = pair // boxes.shape[1]
    return Samples(pair, torch.stack([columns, rows], dim=-1) + 0.5, (frame * h + rows) * w + columns)
