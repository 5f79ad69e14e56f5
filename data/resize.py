"""Dense fields on another grid: vectors and masks are averaged over the cells they cover."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def resize_flow(flow: Float[Tensor, "b 2 h w"], height: int, width: int) -> Float[Tensor, "b 2 {height} {width}"]:
    """The same motion on another grid: vectors averaged over (or interpolated between) cells, then rescaled.

    Shrinking averages over areas (every vector counts once); growing interpolates bilinearly. The result is in cells
    of the new grid.
    """
    h, w = flow.shape[-2:]
    if (h, w) == (height, width):
        return flow
    scale = torch.tensor([width / w, height / h], device=flow.device, dtype=flow.dtype)
    return resize_field(flow, height, width) * scale[None, :, None, None]


def resize_field(field: Float[Tensor, "b c h w"], height: int, width: int) -> Float[Tensor, "b c {height} {width}"]:
    """A scalar field (mask, visibility, error) on another grid: mean over areas, or bilinear where it grows."""
    h, w = field.shape[-2:]
    if height <= h and width <= w:
        return F.interpolate(field, (height, width), mode="area")
    return F.interpolate(field, (height, width), mode="bilinear", align_corners=False)
