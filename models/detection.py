"""Objects as points: heat maps of centres and of contacts, their losses, and slots that keep their object.

After Zhou, Wang and Kraehenbuehl, "Objects as Points" (CenterNet), 2019, arXiv 1904.07850. Every cell of a coarse
grid says how sure it is to hold the centre of a box, where in the cell that centre lies, and how large the box is.
The Gaussians of the heat map are as wide and high as their boxes are (TTFNet, Liu et al. 2020, arXiv 1909.00700).
A collision is a point too, midway between the two that collide: a yes or no for the whole picture, 25 times rarer than
its opposite, teaches far less than the place where it happens.
Lengths inside are cells of the grid; boxes outside are (x0, y0, x1, y1) in pixels, ends exclusive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from models.blocks import ResidualBlock

# Prior probability of the rare class at the start (Lin et al. 2017, section 3.3): logit of 0.1.
RARE_AT_START = -2.19
# A Gaussian reaches three standard deviations to each side of a centre; narrower than this it would fall between cells.
SIGMAS_PER_SIDE = 6.0
NARROWEST = 1 / 3
# A slot moves its memory of where its object stands only when a peak is at least this sure.
SURE = 0.3
LARGEST_LOG_SIZE = 6.0
# The probability of a centre, and of a contact, at which their heat says one half (see `heat_error`): with 0.5 the best
# threshold for boxes was 0.2 and for collisions 0.15 (docs/log.md).
CENTRE_HALF_AT, CONTACT_HALF_AT = 0.1, 0.02
BESIDE = 0.5
"""The heat of a collision in the frames before and after: hardly a mistake there, since its exact frame is chance."""


@dataclass(frozen=True)
class CentreMaps:
    """What a head says on its grid: logits of centres, offset (x, y) of the centre from the cell's middle in cells, and
    the logarithm of the size (width, height) in cells."""

    heat_logits: Float[Tensor, "b 1 gh gw"]
    offset: Float[Tensor, "b 2 gh gw"]
    log_size: Float[Tensor, "b 2 gh gw"]


@dataclass(frozen=True)
class Centres:
    """Boxes as points: ``cell`` is the row-major index on the grid of the cell that holds the centre."""

    cell: Int[Tensor, "b n"]
    offset: Float[Tensor, "b n 2"]
    log_size: Float[Tensor, "b n 2"]
    present: Bool[Tensor, "b n"]


class HeatHead(nn.Module):
    """Maps from features on the same grid, the first of them logits of something rare."""

    def __init__(self, inputs: int, width: int, maps: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 3, padding=1)
        self.mix = nn.Sequential(ResidualBlock(width), ResidualBlock(width, dilation=2))
        self.out = nn.Conv2d(width, maps, 1)
        with torch.no_grad():
            self.out.bias[0] = RARE_AT_START  # pyright: ignore[reportOptionalSubscript]  # a bias is there by default

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> Float[Tensor, "b m gh gw"]:
        return self.out(F.silu(self.mix(self.enter(features)))).float()


class DetectionHead(nn.Module):
    """`CentreMaps` from features on the same grid."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.maps = HeatHead(inputs, width, 5)

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> CentreMaps:
        out = self.maps(features)
        return CentreMaps(out[:, :1], out[:, 1:3], out[:, 3:])


class CollisionHead(HeatHead):
    """Logits of contact: how sure each cell is that two objects meet midway there. The picture's is the largest."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__(inputs, width, 1)


def centres(
    boxes: Float[Tensor, "b n 4"], presence: Float[Tensor, "b n"], grid: tuple[int, int], *, stride: int
) -> Centres:
    """Boxes in pixels as points on a grid (rows, columns) of ``stride`` pixels per cell. Absent and empty boxes are
    put into cell 0 and do not count."""
    low, high = boxes[..., :2] / stride, boxes[..., 2:] / stride
    present = (presence > 0.5) & (high > low).all(-1)
    middle = (low + high) / 2
    last = torch.tensor([grid[1] - 1, grid[0] - 1], device=boxes.device)
    at = torch.minimum(middle.floor().long().clamp_min(0), last) * present[..., None]
    offset = middle - (at + 0.5)
    log_size = (high - low).clamp_min(1e-3).log()
    return Centres(at[..., 1] * grid[1] + at[..., 0], offset, log_size, present)


def heat_map(points: Centres, grid: tuple[int, int]) -> Float[Tensor, "b 1 gh gw"]:
    """1 at the cells of centres, falling off as a Gaussian in proportion to the box; the largest of several."""
    rows, columns = (torch.arange(length, device=points.cell.device).float() for length in grid)
    sigma = (points.log_size.exp() / SIGMAS_PER_SIDE).clamp_min(NARROWEST)
    dx = (columns - (points.cell % grid[1])[..., None]) / sigma[..., :1]  # b n gw
    dy = (rows - (points.cell // grid[1])[..., None]) / sigma[..., 1:]  # b n gh
    bumps = torch.exp(-(dy.square()[..., :, None] + dx.square()[..., None, :]) / 2)
    return (bumps * points.present[..., None, None]).amax(1, keepdim=True)


def contacts(
    boxes: Float[Tensor, "b n 4"], presence: Float[Tensor, "b n"], pairs: Float[Tensor, "b n n"]
) -> tuple[Float[Tensor, "b p 4"], Float[Tensor, "b p"]]:
    """Boxes of collisions, one for each pair of objects, and which of them there are: midway between the two, and of
    their mean size. A collision of which an object is not visible has no place and is left out."""
    i, j = torch.triu_indices(boxes.shape[1], boxes.shape[1], 1, device=boxes.device)
    return (boxes[:, i] + boxes[:, j]) / 2, pairs[:, i, j] * presence[:, i] * presence[:, j]


def collision_error(
    logits: Float[Tensor, "b t 1 gh gw"],
    boxes: Float[Tensor, "b t n 4"],
    presence: Float[Tensor, "b t n"],
    pairs: Float[Tensor, "b t n n"],
    labelled: Float[Tensor, " b"],
    *,
    stride: int,
) -> Float[Tensor, ""]:
    """`heat_error` of the contacts of consecutive frames, where a frame beside a collision has `BESIDE` of its heat."""
    grid = (logits.shape[-2], logits.shape[-1])
    places, there = contacts(boxes.flatten(0, 1), presence.flatten(0, 1), pairs.flatten(0, 1))
    heat = heat_map(centres(places, there, grid, stride=stride), grid).unflatten(0, logits.shape[:2])
    beside = F.pad(BESIDE * heat, (0, 0, 0, 0, 0, 0, 1, 1))
    heat = torch.stack([heat, beside[:, :-2], beside[:, 2:]]).amax(0)
    weight = labelled[:, None].expand(logits.shape[:2]).flatten()
    return heat_error(logits.flatten(0, 1), heat.flatten(0, 1), weight, half_at=CONTACT_HALF_AT)


def heat_error(
    logits: Float[Tensor, "b 1 gh gw"],
    heat: Float[Tensor, "b 1 gh gw"],
    labelled: Float[Tensor, " b"],
    *,
    half_at: float = 0.5,
) -> Float[Tensor, ""]:
    """The penalty-reduced focal loss of CenterNet (equation 1, alpha = 2, beta = 4), per object of labelled windows.

    With the paper's loss, ``half_at = 0.5``, a cell says one half where a centre is as likely as not. Which of some
    neighbouring cells holds it is often open, so that no peak would reach one half; what is no centre weighs less here,
    so that one half is said where there is one with the probability ``half_at``.
    """
    logits, weight = logits.float(), labelled[:, None, None, None]
    p, is_centre = logits.sigmoid(), (heat >= 1).float()
    found = (1 - p).square() * F.softplus(-logits) * is_centre
    quiet = half_at / (1 - half_at) * (1 - heat).pow(4) * p.square() * F.softplus(logits)
    return ((found + quiet) * weight).sum() / (is_centre * weight).sum().clamp_min(1)


def box_error(maps: CentreMaps, points: Centres, labelled: Float[Tensor, " b"]) -> Float[Tensor, ""]:
    """L1 of offset (cells) and of logarithmic size at the true centres, mean over the objects of labelled windows.

    The logarithm, because an error of a pixel is much for a far object and little for a near one."""
    weight = (points.present * labelled[:, None])[..., None]
    error = (_at(maps.offset, points.cell) - points.offset).abs() + (
        _at(maps.log_size, points.cell) - points.log_size
    ).abs()
    return (error * weight).sum() / weight.sum().clamp_min(1)


def detection_error(
    maps: CentreMaps,
    boxes: Float[Tensor, "b n 4"],
    presence: Float[Tensor, "b n"],
    labelled: Float[Tensor, " b"],
    *,
    stride: int,
) -> Float[Tensor, ""]:
    """`heat_error` plus `box_error`. 0 with a zero gradient where no window is labelled."""
    grid = (maps.heat_logits.shape[2], maps.heat_logits.shape[3])
    points = centres(boxes, presence, grid, stride=stride)
    heat = heat_error(maps.heat_logits, heat_map(points, grid), labelled, half_at=CENTRE_HALF_AT)
    return heat + box_error(maps, points, labelled)


def decode(maps: CentreMaps, n: int, *, stride: int) -> tuple[Float[Tensor, "b n 4"], Float[Tensor, "b n"]]:
    """The ``n`` surest local maxima (of 3x3 cells) as boxes in pixels, cut to the picture, and how sure they are.

    Fewer maxima leave zeros. Surest first.
    """
    heat = maps.heat_logits.float().sigmoid()
    gh, gw = heat.shape[-2:]
    peaks = heat * (heat == F.max_pool2d(heat, 3, stride=1, padding=1))
    presence, cell = peaks.flatten(1).topk(min(n, gh * gw), dim=1)
    presence, cell = (F.pad(value, (0, n - value.shape[1])) for value in (presence, cell))
    middle = torch.stack([cell % gw, cell // gw], dim=-1) + 0.5 + _at(maps.offset, cell)
    half = _at(maps.log_size, cell).clamp_max(LARGEST_LOG_SIZE).exp() / 2
    picture = torch.tensor([gw, gh, gw, gh], device=heat.device) * stride
    boxes = (torch.cat([middle - half, middle + half], dim=-1) * stride).clamp_min(0).minimum(picture)
    return boxes * (presence > 0)[..., None], presence


def link(
    boxes: Float[Tensor, "b y n 4"], presence: Float[Tensor, "b y n"]
) -> tuple[Float[Tensor, "b y n 4"], Float[Tensor, "b y n"]]:
    """The same detections in an order in which a slot stays one object from step to step.

    Peaks are assigned to slots (Kuhn 1955) so that the sum over slots of how sure slot and peak are, times how near
    they are (a Gaussian of the distance of their centres in box sizes), is largest. A slot remembers the box that it
    was last sure of, so an object that is hidden for some steps comes back to its own.
    """
    linked, sure = boxes.clone(), presence.clone()
    for i in range(len(boxes)):
        memory, strength = boxes[i, 0].clone(), presence[i, 0].clone()
        for k in range(1, boxes.shape[1]):
            nearness = _nearness(memory, boxes[i, k])
            worth = strength[:, None] * presence[i, k][None] * nearness
            order = linear_sum_assignment(np.asarray(worth.double().cpu()), maximize=True)[1]
            chosen = torch.from_numpy(order).to(boxes.device)
            linked[i, k], sure[i, k] = boxes[i, k][chosen], presence[i, k][chosen]
            moves = (sure[i, k] >= SURE) | (sure[i, k] >= strength)
            memory = torch.where(moves[:, None], linked[i, k], memory)
            strength = torch.where(moves, sure[i, k], strength)
    return linked, sure


def _nearness(a: Float[Tensor, "n 4"], b: Float[Tensor, "m 4"]) -> Float[Tensor, "n m"]:
    middle_a, middle_b = (a[:, :2] + a[:, 2:]) / 2, (b[:, :2] + b[:, 2:]) / 2
    size_a, size_b = (a[:, 2:] - a[:, :2]).mean(1), (b[:, 2:] - b[:, :2]).mean(1)
    scale = ((size_a[:, None] + size_b[None]) / 2).clamp_min(1)
    return torch.exp(-torch.cdist(middle_a, middle_b).square() / (2 * scale.square()))


def _at(field: Float[Tensor, "b c gh gw"], cell: Int[Tensor, "b n"]) -> Float[Tensor, "b n c"]:
    index = cell[:, None].expand(-1, field.shape[1], -1)
    return field.flatten(2).gather(2, index).transpose(1, 2)
