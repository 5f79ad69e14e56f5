"""Motion applied to pictures: the fields that are asked for, and how closely a clip follows them.

A requested motion is a backward flow per step, ``flow_bwd[k]`` on the grid of result k, pointing to the frame before it
(the first frame for k = 0), in pixels; it is zero where nothing is to move.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.errors import EmptyError
from data.picture import to_uint8
from models.flow_teachers import build_teacher
from models.warp import backward_warp, fastest_nearby

MOVING_PX = 0.5
_FARTHEST_PX = 24
"""A vector longer than this drags no ground behind it: looking for the longest nearby is quadratic in its length."""


def move_region(region: Bool[Tensor, "h w"], dx: float, dy: float, steps: int) -> Float[Tensor, "{steps} 2 h w"]:
    """``region`` moves by (dx, dy) pixels (right, down) in every step; everything else stands still."""
    shift = torch.tensor([dx, dy])[:, None, None]
    flows = []
    for step in range(1, steps + 1):
        there = backward_warp(region[None, None].float(), (-step * shift).expand(1, 2, *region.shape))[0] > 0.5
        # Beyond the border a warp repeats it; what has left the picture is gone.
        ys, xs = torch.meshgrid(*(torch.arange(n) for n in region.shape), indexing="ij")
        x, y = xs - step * dx, ys - step * dy
        inside = (x >= 0) & (x < region.shape[1]) & (y >= 0) & (y < region.shape[0])
        flows.append(torch.where(there & inside, -shift, 0.0))
    return torch.stack(flows)


def disc(height: int, width: int, x: float, y: float, radius: float) -> Bool[Tensor, "{height} {width}"]:
    """Pixels within ``radius`` of (x, y)."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (xs - x).square() + (ys - y).square() <= radius**2


def drag_ground(flow_bwd: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """The same motion with the ground behind every object pulled along, as `models.warp.advect_flow` does it.

    Where an object has left, a field at rest would leave a copy of it standing. A cell at rest from which something
    came (the longest vector nearby points from where it is now to this cell) takes that vector: it then looks up the
    ground further behind. What stands still and was not left is not touched.
    """
    length = flow_bwd.norm(dim=1, keepdim=True)
    reach = min(math.ceil(float(length.max())), _FARTHEST_PX)
    if reach == 0:
        return flow_bwd
    candidate = fastest_nearby(flow_bwd, reach)
    came_from_here = backward_warp(flow_bwd, -candidate)
    size = candidate.norm(dim=1, keepdim=True)
    left = (came_from_here - candidate).norm(dim=1, keepdim=True) < 0.5 * size
    return torch.where(left & (length <= MOVING_PX) & (size > MOVING_PX), candidate, flow_bwd)


@dataclass(frozen=True)
class Carried:
    """The first frame carried along the requested motion, pixel by pixel, without any model.

    ``seen`` is false where the ground was covered in some frame before: nobody knows what stands there.
    """

    frames: Float[Tensor, "y 3 h w"]
    seen: Bool[Tensor, "y 1 h w"]


def carry(first: Float[Tensor, "3 h w"], flow_bwd: Float[Tensor, "y 2 h w"]) -> Carried:
    """Warp ``first`` step by step."""
    frame, known = first[None], torch.ones_like(first[None, :1])
    frames, seen = [], []
    for asked, dragged in zip(flow_bwd[:, None], drag_ground(flow_bwd)[:, None], strict=True):
        frame, known = backward_warp(frame, dragged), backward_warp(known, dragged)
        known = known * (asked == dragged).all(1, keepdim=True)
        frames.append(frame)
        seen.append(known > 0.5)
    return Carried(torch.cat(frames), torch.cat(seen))


def measure(
    result: Float[Tensor, "y 3 h w"],
    first: Float[Tensor, "3 h w"],
    flow_bwd: Float[Tensor, "y 2 h w"],
    *,
    elsewhere: Float[Tensor, "y 3 h w"] | None = None,
) -> dict[str, float]:
    """How far a clip follows the motion and keeps the appearance that were asked for; means over all steps.

    - ``epe``: pixels; flow of the clip (first frame and result) as the teacher `dis` measures it, against the requested
      flow, over the pixels that were asked to move by more than half a pixel. ``epe_still`` is what a clip in which
      nothing moves would have, had it been measured without error: the mean length of what was asked for.
    - ``psnr``, ``psnr_moving``: dB, of the result against `carry`, over the pixels that `carry` knows, and of these
      over the moving ones. ``psnr_still``, ``psnr_moving_still``: the same of the first frame held still.
    - ``colour_distance``: of the mean RGB over the moving pixels to that of `carry`, Euclidean, in [0, sqrt(3)];
      ``colour_distance_elsewhere`` likewise to the frames ``elsewhere`` (those that the motion was taken from): the
      result should be near the first and, where appearances differ, far from the second.

    Raises EmptyError if nothing was asked to move.
    """
    moving = flow_bwd.norm(dim=1, keepdim=True) > MOVING_PX
    if not moving.any():
        raise EmptyError(
            f"the requested motion moves no pixel by more than {MOVING_PX} px",
            remedy="choose another --start or --move",
        )
    carried = carry(first, flow_bwd)
    clip = torch.from_numpy(to_uint8(torch.cat([first[None], result]).numpy()))
    measured = build_teacher("dis")(clip).flow_bwd
    known, still = carried.seen, first.expand_as(result)
    figures = {
        "epe": _mean((measured - flow_bwd).norm(dim=1, keepdim=True), moving),
        "epe_still": _mean(flow_bwd.norm(dim=1, keepdim=True), moving),
        "psnr": _psnr(result, carried.frames, known),
        "psnr_still": _psnr(still, carried.frames, known),
        "psnr_moving": _psnr(result, carried.frames, known & moving),
        "psnr_moving_still": _psnr(still, carried.frames, known & moving),
        "colour_distance": colour_distance(result, carried.frames, moving),
    }
    if elsewhere is not None:
        figures["colour_distance_elsewhere"] = colour_distance(result, elsewhere, moving)
    return {name: round(value, 4) for name, value in figures.items()}


def colour_distance(a: Float[Tensor, "y 3 h w"], b: Float[Tensor, "y 3 h w"], region: Bool[Tensor, "y 1 h w"]) -> float:
    """Between the mean colours of two clips over ``region``, step by step; mean over steps in which it is not empty."""
    count = region.sum((2, 3))
    difference = ((a - b) * region).sum((2, 3)) / count.clamp_min(1)
    return float(difference.norm(dim=1)[count[:, 0] > 0].mean())


def _mean(values: Float[Tensor, "y 1 h w"], region: Bool[Tensor, "y 1 h w"]) -> float:
    return float(values[region].mean())


def _psnr(a: Float[Tensor, "y 3 h w"], b: Float[Tensor, "y 3 h w"], region: Bool[Tensor, "y 1 h w"]) -> float:
    squared = (a - b).square().mean(1, keepdim=True)[region].mean()
    return float(-10 * squared.clamp_min(1e-10).log10())
