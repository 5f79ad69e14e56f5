"""Objects as points: a heat map of centres with size and offset, its losses, and slots that keep their object.

After Zhou, Wang and Kraehenbuehl, "Objects as Points" (CenterNet), 2019, arXiv 1904.07850. Every cell of a coarse
grid says how sure it is to hold the centre of a box, where in the cell that centre lies, and how large the box is.
The Gaussians of the heat map are as wide and high as their boxes are (TTFNet, Liu et al. 2020, arXiv 1909.00700).
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

# Prior probability of the rare class at the start (Lin et al. 2017, section 3.3): logit of 0.1.
RARE_AT_START = -2.19
# A Gaussian reaches three standard deviations to each side of a centre; narrower than this it would fall between cells.
SIGMAS_PER_SIDE = 6.0
NARROWEST = 1 / 3
# A slot moves its memory of where its object stands only when a peak is at least this sure.
SURE = 0.3
LARGEST_LOG_SIZE = 6.0


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


class DetectionHead(nn.Module):
    """`CentreMaps` from features on the same grid."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs, width, 3, padding=1)
        self.out = nn.Conv2d(width, 5, 1)
        with torch.no_grad():
            self.out.bias[0] = RARE_AT_START  # pyright: ignore[reportOptionalSubscript]  # a bias is there by default

    def forward(self, features: Float[Tensor, "b c gh gw"]) -> CentreMaps:
        out = self.out(F.silu(self.enter(features))).float()
        return CentreMaps(out[:, :1], out[:, 1:3], out[:, 3:])


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


def heat_error(
    logits: Float[Tensor, "b 1 gh gw"], heat: Float[Tensor, "b 1 gh gw"], labelled: Float[Tensor, " b"]
) -> Float[Tensor, ""]:
    """The penalty-reduced focal loss of CenterNet (equation 1, alpha = 2, beta = 4), per object of labelled windows."""
    logits, weight = logits.float(), labelled[:, None, None, None]
    p, is_centre = logits.sigmoid(), (heat >= 1).float()
    found = (1 - p).square() * F.softplus(-logits) * is_centre
    quiet = (1 - heat).pow(4) * p.square() * F.softplus(logits)
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
    return heat_error(maps.heat_logits, heat_map(points, grid), labelled) + box_error(maps, points, labelled)


def focal_error(
    logits: Float[Tensor, " b"], target: Float[Tensor, " b"], labelled: Float[Tensor, " b"], *, alpha: float = 0.9
) -> Float[Tensor, ""]:
    """Focal loss of a rare yes (Lin et al. 2017, arXiv 1708.02002, gamma = 2), mean over labelled windows; 0 without.

    ``alpha`` weighs yes, ``1 - alpha`` no: at one yes in 25, 0.9 makes one half the answer to a chance of one tenth.
    """
    logits = logits.float()
    p = logits.sigmoid()
    yes = alpha * target * (1 - p).square() * F.softplus(-logits)
    no = (1 - alpha) * (1 - target) * p.square() * F.softplus(logits)
    return ((yes + no) * labelled).sum() / labelled.sum().clamp_min(1)


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
