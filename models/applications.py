"""Motion applied to pictures: the fields that are asked for, and how closely a clip follows them.

A requested motion is a backward flow per step, ``flow_bwd[k]`` on the grid of result k, pointing to the frame before it
(the first frame for k = 0), in pixels; it is zero where nothing is to move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.errors import EmptyError
from data.picture import to_uint8
from models.flow_teachers import build_teacher
from models.warp import backward_warp, chain_flow, fastest_nearby, speed

MOVING_PX = 0.5
_MARGIN_PX = 3
"""How far beyond the moving pixels their motion is extended: flows of teachers end a little inside of objects."""


def move_region(region: Bool[Tensor, "h w"], dx: float, dy: float, steps: int) -> Float[Tensor, "{steps} 2 h w"]:
    """``region`` moves by (dx, dy) pixels (right, down) in every step; everything else stands still."""
    shift = torch.tensor([dx, dy])
    there = [_shifted(region, k * shift) for k in range(1, steps + 1)]
    return torch.stack([torch.where(mask, -shift[:, None, None], 0.0) for mask in there])


def disc(height: int, width: int, x: float, y: float, radius: float) -> Bool[Tensor, "{height} {width}"]:
    """Pixels within ``radius`` of (x, y)."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (xs - x).square() + (ys - y).square() <= radius**2


def drag_ground(flow_bwd: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """The same motion with the ground around and behind every object pulled along.

    Where an object has left, a field at rest would leave a copy of it standing, and where a flow ends inside an object
    it would leave its edge. So the motion is widened by a few pixels, and places at rest from which something came
    look up the ground further behind it, by the vector of what left them, as `models.warp.advect_flow` does.
    """
    wide = torch.where(_moves(flow_bwd), flow_bwd, fastest_nearby(flow_bwd, _MARGIN_PX))
    moving = _moves(wide)
    h, w = flow_bwd.shape[-2:]
    left = torch.zeros_like(wide)
    b, ys, xs = moving[:, 0].nonzero(as_tuple=True)
    vectors = wide[b, :, ys, xs]
    came_x, came_y = (xs + vectors[:, 0]).round().long(), (ys + vectors[:, 1]).round().long()
    inside = (came_x >= 0) & (came_x < w) & (came_y >= 0) & (came_y < h)
    left[b[inside], :, came_y[inside], came_x[inside]] = vectors[inside]
    # Rounding leaves holes where a motion spreads.
    left = torch.where(_moves(left), left, fastest_nearby(left, 1))
    return torch.where(moving, wide, left)


def whole_objects(flow_bwd: Float[Tensor, "y 2 h w"], objects: Bool[Tensor, "n h w"]) -> Float[Tensor, "y 2 h w"]:
    """The motion given to whole objects: each that it meets moves, unchanged in shape, by the mean of what moves on it.

    ``objects`` are masks in the first frame. An object is met in a step if at least half of its pixels are asked to
    move where it then stands; else it rests in that step.
    """
    fields = torch.zeros_like(flow_bwd)
    for mask in objects:
        place = torch.zeros(2)
        there = mask
        for k, flow in enumerate(flow_bwd):
            hit = there & _moves(flow[None])[0, 0]
            if not there.any() or 2 * hit.sum() < there.sum():
                continue
            step = flow[:, hit].mean(1)
            place = place - step
            there = _shifted(mask, place)
            fields[k] = torch.where(there, step[:, None, None], fields[k])
    return fields


def _moves(flow_bwd: Float[Tensor, "b 2 h w"]) -> Bool[Tensor, "b 1 h w"]:
    return speed(flow_bwd) > MOVING_PX


def _shifted(region: Bool[Tensor, "h w"], by: Float[Tensor, "2"]) -> Bool[Tensor, "h w"]:
    """The region moved by (dx, dy); what leaves the picture is gone."""
    h, w = region.shape
    ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    x, y = (xs - by[0]).round().long(), (ys - by[1]).round().long()
    inside = (x >= 0) & (x < w) & (y >= 0) & (y < h)
    return region[y.clamp(0, h - 1), x.clamp(0, w - 1)] & inside


@dataclass(frozen=True)
class Carried:
    """The first frame carried along the requested motion, pixel by pixel, without any model.

    ``seen`` is false where the ground was covered in some frame before: nobody knows what stands there.
    """

    frames: Float[Tensor, "y 3 h w"]
    seen: Bool[Tensor, "y 1 h w"]


def carry(first: Float[Tensor, "3 h w"], flow_bwd: Float[Tensor, "y 2 h w"]) -> Carried:
    """Warp ``first`` by the chained flows, which samples it once."""
    chained, known = torch.zeros_like(flow_bwd[:1]), torch.ones_like(first[None, :1])
    frames, seen = [], []
    for asked, dragged in zip(flow_bwd[:, None], drag_ground(flow_bwd)[:, None], strict=True):
        chained, known = chain_flow(dragged, chained), backward_warp(known, dragged)
        known = known * (asked == dragged).all(1, keepdim=True)
        frames.append(backward_warp(first[None], chained))
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
    moving = _moves(flow_bwd)
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
        "epe": _mean(speed(measured - flow_bwd), moving),
        "epe_still": _mean(speed(flow_bwd), moving),
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
