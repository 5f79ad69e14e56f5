"""Backward warping, the one way in which this project moves pixels or latents along optical flow.

A flow field says where it lives and where it points (both directions follow one naming):

- ``flow_fwd[t]`` lives on the grid of frame t and points to t+1;
- ``flow_bwd[t]`` lives on the grid of frame t+1 and points to t.

Making frame t+1 out of frame t is a look-up from every pixel of t+1 into t, so it takes ``flow_bwd``. Using
``flow_fwd`` there is the commonest silent error of the field; `tests/test_warp.py` shows that it fails.
Channel 0 is dx (right), channel 1 is dy (down), in cells of the grid that the tensor lives on.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from data.resize import resize_flow

__all__ = ["advect_flow", "backward_warp", "chain_flow", "fastest_nearby", "resize_flow", "speed"]


def backward_warp(
    source: Float[Tensor, "b c h w"], flow_bwd: Float[Tensor, "b 2 h w"], *, mode: str = "bilinear"
) -> Float[Tensor, "b c h w"]:
    """``out(x) = source(x + flow_bwd(x))``: the source seen from the grid on which ``flow_bwd`` lives.

    Samples outside the source take the value of the nearest border pixel. ``mode`` is that of
    `torch.nn.functional.grid_sample` (``bilinear``, ``bicubic`` or ``nearest``). Computed in float32 under
    autocast: half-precision coordinates are off by up to 0.06 px at a width of 128.
    """
    h, w = source.shape[-2:]
    with torch.autocast(device_type=source.device.type, enabled=False):
        flow = flow_bwd.float()
        xs = torch.arange(w, device=flow.device, dtype=flow.dtype)
        ys = torch.arange(h, device=flow.device, dtype=flow.dtype)
        # align_corners=False: pixel i has its centre at (2 i + 1) / w - 1 in normalised coordinates.
        grid_x = (2 * (xs[None, None, :] + flow[:, 0]) + 1) / w - 1
        grid_y = (2 * (ys[None, :, None] + flow[:, 1]) + 1) / h - 1
        grid = torch.stack([grid_x, grid_y], dim=-1)
        out = F.grid_sample(source.float(), grid, mode=mode, padding_mode="border", align_corners=False)
    return out.to(source.dtype)


def chain_flow(flow_bwd: Float[Tensor, "b 2 h w"], before_bwd: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 2 h w"]:
    """One flow for two pairs: ``flow_bwd`` leads to the frame on which ``before_bwd`` lives, and that one further back.

    Warping once by a chain of flows samples the picture once, where warping by each blurs it each time.
    """
    return flow_bwd + backward_warp(before_bwd, flow_bwd)


@torch.no_grad()
def speed(flow_bwd: Float[Tensor, "b 2 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Lengths of the vectors, without gradient. `Tensor.norm` over two channels takes 80 times as long on a CPU."""
    return torch.hypot(flow_bwd[:, :1], flow_bwd[:, 1:])


def advect_flow(flow_bwd: Float[Tensor, "b 2 h w"], *, reach: int = 3) -> Float[Tensor, "b 2 h w"]:
    """The flow of the next pair under constant velocity: every vector is carried along by itself.

    ``flow_bwd`` of the pair (t-1, t) lives on t. What stands at x in t+1 stood at x + v' in t and moves on as it did
    there, so the next field solves ``v'(x) = v(x + v'(x))``. In front of a moving object both rest and the object's
    motion solve this; what moves is in front of the ground, so the larger solution is taken: one look-up along the
    largest vector within ``reach`` cells. Behind the object neither does, and the old vector stays: it brings ground
    from further behind to where the object was.

    Iterating from v instead, which finds the solution at rest, eats the front of every object step by step: with flow
    that ends at the objects' edges, twelve steps of advection on real videos score a mean skill of 0.41 instead of 0.55
    (docs/log.md). Gradients pass through the vectors, not through the places they are looked up at: trained
    through, twelve look-ups in a row explode.
    """
    arriving = backward_warp(flow_bwd, fastest_nearby(flow_bwd, reach))
    faster = speed(arriving) > speed(flow_bwd)
    return torch.where(faster, arriving, flow_bwd)


@torch.no_grad()
def fastest_nearby(flow_bwd: Float[Tensor, "b 2 h w"], reach: int) -> Float[Tensor, "b 2 h w"]:
    """The longest vector within ``reach`` cells (a square) of every cell. No gradient passes."""
    h, w = flow_bwd.shape[-2:]
    _, place = F.max_pool2d(speed(flow_bwd), 2 * reach + 1, stride=1, padding=reach, return_indices=True)
    return flow_bwd.flatten(2).gather(2, place.flatten(2).expand(-1, 2, -1)).unflatten(2, (h, w))
