"""Pictures of annotated scenes in CLEVRER's look: gray ground, four fixed lamps, rubber and metal, soft shadows.

Lamps, tones and the ground were measured on released videos: lamps from their highlights on metal spheres (they are
CLEVR's, source: Johnson et al., "CLEVR", CVPR 2017, base scene), tones by least squares over rubber and metal
surfaces of known normals. Light is linear inside this module, sRGB outside. What moves in a picture moves exactly as
`raycast.rigid_flow` says, except what real light moves differently too: shadows, highlights and reflections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from data.camera import Camera
from data.raycast import CYLINDER_HALF_HEIGHT, Scene, box_samples, cast, cast_at, image_boxes
from data.world import COLORS, SHAPES, Annotation


@dataclass(frozen=True)
class Lamp:
    """``position`` in world units, ``power`` relative to the light that falls on open ground, ``size`` the angular
    radius of the lamp in radians (how soft its shadows are), ``glint`` how bright metal mirrors it."""

    position: tuple[float, float, float]
    power: float
    size: float
    glint: float


LAMPS: Final = (
    Lamp((6.45, -2.91, 4.26), power=0.36, size=0.08, glint=1.0),  # key
    Lamp((-4.67, -4.01, 3.01), power=0.14, size=0.08, glint=0.6),  # fill
    Lamp((-1.12, 2.65, 5.82), power=0.26, size=0.06, glint=0.9),  # back
    Lamp((15.0, -8.3, 36.0), power=0.12, size=0.16, glint=1.0),  # overhead, far away
)
AMBIENT: Final = 0.52
#: How much of what it reflects metal gives back, towards the ground and towards the dark sky.
METAL_GROUND: Final = 0.86
METAL_SKY: Final = 0.24
#: Cosine sharpness of highlights on metal.
GLINT_SHARPNESS: Final = 150.0
#: sRGB gray of the empty ground on a coarse grid over the picture (rows, columns), and blue minus red at the top and
#: the bottom: medians of released videos.
GROUND: Final = (
    (112.3, 123.1, 122.2, 118.6, 115.9, 114.0, 112.0, 109.8),
    (138.8, 137.9, 133.3, 130.6, 129.1, 128.2, 126.5, 123.5),
    (128.6, 130.0, 131.2, 132.3, 133.4, 133.8, 133.2, 131.5),
    (131.6, 132.3, 132.7, 133.8, 134.3, 134.6, 134.0, 132.7),
    (131.8, 132.7, 133.4, 133.9, 133.8, 133.3, 132.6, 131.7),
    (135.5, 135.6, 135.5, 135.1, 134.4, 133.4, 132.0, 131.0),
    (136.7, 136.6, 136.4, 135.8, 134.9, 133.6, 132.1, 130.8),
)
GROUND_TINT: Final = (3.0, -4.0)
#: Radius of the ball that stands for each shape where only its shadow counts.
_BALL: Final = {"sphere": 0.195, "cylinder": 0.215, "cube": 0.225}
_CHUNK: Final = 16
_TONES: Final = 16384
_OFFSETS: Final = ((-0.25, -0.25), (0.25, -0.25), (-0.25, 0.25), (0.25, 0.25))


def render(
    annotation: Annotation, frames: Sequence[int], height: int, width: int, *, device: torch.device | str = "cpu"
) -> UInt8[np.ndarray, "t h w 3"]:
    """RGB frames of a video at the given indices of its annotation, edges smoothed by four samples per pixel.

    Raises IndexError for frames outside the annotation.
    """
    scene, camera = Scene.of(annotation, frames, device), Camera.clevrer(height, width)
    color = torch.tensor([COLORS[p.color] for p in annotation.properties], device=device) / 255
    metal = torch.tensor([p.material == "metal" for p in annotation.properties], device=device)
    ground = empty_ground(camera, device)
    out = np.empty((len(frames), height, width, 3), dtype=np.uint8)
    for first in range(0, len(frames), _CHUNK):
        part = scene[first : first + _CHUNK]
        out[first : first + _CHUNK] = _render(part, camera, to_linear(color), metal, ground).cpu().numpy()
    return out


def _render(
    scene: Scene,
    camera: Camera,
    color: Float[Tensor, "n 3"],
    metal: Bool[Tensor, " n"],
    ground: Float[Tensor, "h w 3"],
) -> UInt8[Tensor, "t h w 3"]:
    light = ground_light(scene, camera)
    hits = cast(scene, camera)
    k, y, x = (hits.instance >= 0).nonzero(as_tuple=True)
    centre = torch.stack([x, y], dim=-1) + 0.5
    surface = _surface(scene, camera, k, centre, hits.instance[k, y, x], hits.depth[k, y, x])
    bodies, cover = light.new_zeros((*light.shape, 3)), torch.zeros_like(light)
    bodies[k, y, x], cover[k, y, x] = _shade(surface, color, metal), 1.0

    k, y, x = _edges(surface, hits.instance.shape, k, y, x).nonzero(as_tuple=True)
    centre = torch.stack([x, y], dim=-1) + 0.5
    mean, part = bodies.new_zeros((k.shape[0], 3)), cover.new_zeros(k.shape[0])
    for offset in _OFFSETS:
        pixel = centre + torch.tensor(offset).to(centre)
        slot, depth = cast_at(scene, camera, k, pixel)
        hit = (slot >= 0).nonzero()[:, 0]
        surface = _surface(scene, camera, k[hit], pixel[hit], slot[hit], depth[hit])
        mean[hit] += _shade(surface, color, metal) / len(_OFFSETS)
        part[hit] += 1 / len(_OFFSETS)
    bodies[k, y, x], cover[k, y, x] = mean, part

    k, y, x = ((cover > 0) | (light < 0.997)).nonzero(as_tuple=True)
    out = to_bytes(ground).expand(*light.shape, 3).clone()
    open_ground = ground[y, x] * (light[k, y, x] * (1 - cover[k, y, x]))[:, None]
    out[k, y, x] = to_bytes(open_ground + bodies[k, y, x])
    return out


@dataclass(frozen=True)
class _Surface:
    """Points that rays met: object, place, outward normal, direction of sight, and a code of the face met."""

    slot: Int64[Tensor, " m"]
    point: Float[Tensor, "m 3"]
    normal: Float[Tensor, "m 3"]
    view: Float[Tensor, "m 3"]
    face: UInt8[Tensor, " m"]


def _surface(
    scene: Scene,
    camera: Camera,
    frame: Int64[Tensor, " m"],
    pixel: Float[Tensor, "m 2"],
    slot: Int64[Tensor, " m"],
    depth: Float[Tensor, " m"],
) -> _Surface:
    ray = camera.rays(pixel)
    point = torch.tensor(camera.position).to(ray) + depth[:, None] * ray
    normal, face = surface_normal(scene, frame, slot, point)
    return _Surface(slot, point, normal, F.normalize(ray, dim=-1), (slot * 8 + face + 1).to(torch.uint8))


def _edges(surface: _Surface, shape: torch.Size, k: Tensor, y: Tensor, x: Tensor) -> Bool[Tensor, "t h w"]:
    """Pixels beside one that shows another object or another face."""
    faces = torch.zeros(shape, dtype=torch.uint8, device=k.device)
    faces[k, y, x] = surface.face
    edge = torch.zeros(shape, dtype=torch.bool, device=k.device)
    across, down = faces[:, :, 1:] != faces[:, :, :-1], faces[:, 1:] != faces[:, :-1]
    edge[:, :, 1:] |= across
    edge[:, :, :-1] |= across
    edge[:, 1:] |= down
    edge[:, :-1] |= down
    return edge


def surface_normal(
    scene: Scene, frame: Int64[Tensor, " m"], slot: Int64[Tensor, " m"], point: Float[Tensor, "m 3"]
) -> tuple[Float[Tensor, "m 3"], Int64[Tensor, " m"]]:
    """Outward unit normals at points on the surfaces of objects, in the world, and which of up to 7 faces it is."""
    arm, rotation = point - scene.position[frame, slot], scene.rotation[frame, slot]
    local = (rotation.mT @ arm[..., None])[..., 0]
    side = local.abs().argmax(-1)
    face = F.one_hot(side, 3) * local.sign()
    cap = local[:, 1:2].abs() > CYLINDER_HALF_HEIGHT - 1e-3
    axis = torch.tensor([0.0, 1.0, 0.0]).to(local)
    round_ = torch.where(cap, axis * local.sign(), local * (1 - axis))
    shape = scene.shape[slot][:, None]
    turned = (rotation @ torch.where(shape == SHAPES.index("cube"), face, round_)[..., None])[..., 0]
    normal = F.normalize(torch.where(shape == SHAPES.index("sphere"), arm, turned), dim=-1)
    number = torch.where(shape == SHAPES.index("cube"), side[:, None] * 2 + (local.gather(1, side[:, None]) > 0), cap)
    return normal, torch.where(shape == SHAPES.index("sphere"), 0, number)[:, 0]


def _shade(surface: _Surface, colors: Float[Tensor, "n 3"], metals: Bool[Tensor, " n"]) -> Float[Tensor, "m 3"]:
    """Rubber: ambient plus Lambert's cosine per lamp. Metal: mirrors the ground, the dark sky and the lamps."""
    point, normal, view = surface.point, surface.normal, surface.view
    color, metal = colors[surface.slot], metals[surface.slot]
    mirrored = view - 2 * (view * normal).sum(-1, keepdim=True) * normal
    diffuse = torch.full_like(point[:, 0], AMBIENT)
    glint = torch.zeros_like(diffuse)
    for lamp in LAMPS:
        towards = F.normalize(torch.tensor(lamp.position).to(point) - point, dim=-1)
        diffuse += lamp.power * (normal * towards).sum(-1).clamp(min=0)
        glint += lamp.glint * ((mirrored * towards).sum(-1) - 1).mul(GLINT_SHARPNESS).exp()
    up = torch.sigmoid(mirrored[:, 2] * 30)
    below = METAL_GROUND * (1 - 0.2 * (-mirrored[:, 2] - 0.6).clamp(min=0) / 0.4)  # its own shadow at its foot
    mirror = below * (1 - up) + (METAL_SKY + 0.2 * (mirrored[:, 2] - 0.5).clamp(min=0)) * up
    return torch.where(metal[:, None], color * mirror[:, None] + 0.7 * glint[:, None], color * diffuse[:, None])


# --- the ground ---------------------------------------------------------------------------------------------------


def empty_ground(camera: Camera, device: torch.device | str = "cpu") -> Float[Tensor, "h w 3"]:
    """The ground without objects, in linear light."""
    size = (camera.height, camera.width)
    grid = torch.tensor(GROUND, device=device)[None, None]
    gray = F.interpolate(grid, size, mode="bicubic", align_corners=True)[0, 0]
    tint = torch.linspace(*GROUND_TINT, camera.height, device=device)[:, None].expand(size)
    return to_linear(torch.stack([gray - tint / 2, gray - tint / 8, gray + tint / 2], dim=-1) / 255)


def ground_light(scene: Scene, camera: Camera) -> Float[Tensor, "t h w"]:
    """What shadows leave of the light on the ground, in (0, 1].

    Each object stands for a ball. A lamp is a disc of its angular size: it is hidden as far as the two discs
    overlap. Near an object the ambient light is hidden in proportion to the part of the sky that the ball fills.
    Computed on half the grid where the picture is large: soft shadows have no finer detail.
    """
    scale = 2 if camera.width >= 160 else 1
    coarse = Camera.clevrer(camera.height // scale, camera.width // scale)
    t, n = scene.position.shape[:2]
    size = t * coarse.height * coarse.width
    radius = torch.tensor([_BALL[s] for s in SHAPES]).to(scene.position)[scene.shape]
    samples = box_samples(shadow_boxes(scene, coarse), coarse)
    ray = coarse.rays(samples.pixel)
    start = torch.tensor(camera.position).to(ray)
    reach = torch.where(ray[:, 2] < -1e-3, start[2] / -ray[:, 2], torch.inf)
    point = start + reach.clamp(max=50)[:, None] * ray
    arm = scene.position.flatten(0, 1)[samples.pair] - point
    distance = arm.norm(dim=-1)
    away = arm / distance[:, None]
    fill = (radius[samples.pair % n] / distance).clamp(max=0.999)
    angle = fill.asin()
    total = AMBIENT + sum(lamp.power * lamp.position[2] / np.linalg.norm(lamp.position) for lamp in LAMPS)
    lost = AMBIENT * _most(away[:, 2].clamp(min=0) * fill**2, samples.flat, size)
    for lamp in LAMPS:
        towards = F.normalize(torch.tensor(lamp.position).to(point) - point, dim=-1)
        gap = (away * towards).sum(-1).clamp(-1, 1).acos()
        overlap = ((angle + lamp.size - gap) / (2 * lamp.size)).clamp(0, 1)
        hidden = overlap**2 * (3 - 2 * overlap) * (angle / lamp.size).clamp(max=1) ** 2
        lost = lost + lamp.power * lamp.position[2] / float(np.linalg.norm(lamp.position)) * _most(
            hidden, samples.flat, size
        )
    light = (1 - lost / float(total)).view(t, coarse.height, coarse.width)
    if scale == 1:
        return light
    return F.interpolate(light[:, None], (camera.height, camera.width), mode="bilinear", align_corners=False)[:, 0]


def _most(values: Float[Tensor, " m"], where: Int64[Tensor, " m"], size: int) -> Float[Tensor, " s"]:
    """The largest value that falls on each cell, zero where none does (independent of their order)."""
    return values.new_zeros(size).scatter_reduce_(0, where, values, "amax")


def shadow_boxes(scene: Scene, camera: Camera) -> Float[Tensor, "t n 4"]:
    """Image boxes that hold each object and the shadows it casts on the ground."""
    boxes = [image_boxes(scene, camera)]
    here, height = scene.position, 0.45
    corners = torch.cartesian_prod(torch.tensor([-0.5, 0.5]), torch.tensor([-0.5, 0.5])).to(here)
    feet = [here[..., :2]]
    for lamp in LAMPS:
        x, y, z = lamp.position
        feet.append(here[..., :2] - (torch.tensor([x, y]).to(here) - here[..., :2]) * height / (z - height))
    around = torch.stack(feet, dim=-2)[..., None, :] + corners  # t n lamps 4 2
    pixel, depth = camera.project(F.pad(around, (0, 1)).flatten(-3, -2))
    ahead = (depth.amin(-1, keepdim=True) > 0.5).expand(*depth.shape[:2], 4)
    shadow = torch.cat([pixel.amin(-2), pixel.amax(-2)], dim=-1)
    both = torch.cat([torch.minimum(boxes[0], shadow)[..., :2], torch.maximum(boxes[0], shadow)[..., 2:]], dim=-1)
    return torch.where(ahead, both, boxes[0])


# --- light and bytes ----------------------------------------------------------------------------------------------


def to_linear(srgb: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """sRGB in [0, 1] to linear light (IEC 61966-2-1)."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0.04045) + 0.055) / 1.055) ** 2.4)


def to_bytes(linear: Float[Tensor, "*s"]) -> UInt8[Tensor, "*s"]:
    """Linear light to sRGB bytes, clipped (through a table: a fifth of a gray level at worst)."""
    light = torch.linspace(0, 1, _TONES, device=linear.device)
    srgb = torch.where(light <= 0.0031308, 12.92 * light, 1.055 * light.clamp(min=0.0031308) ** (1 / 2.4) - 0.055)
    table = (srgb * 255).round().to(torch.uint8)
    return table[(linear.clamp(0, 1) * (_TONES - 1) + 0.5).long()]
