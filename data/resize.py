"""Dense fields on another grid: vectors and masks are averaged over the cells they cover."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
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


def resize_pictures(frames: UInt8[np.ndarray, "t h w 3"], height: int, width: int) -> UInt8[np.ndarray, "t _ _ 3"]:
    """Pictures sampled bilinearly at the centres of the new pixels, without antialiasing, rounded to 8 bits.

    So torchvision's ``Resize`` treated tensors until 0.16, which SlotFormer was evaluated with (0.11). Fine patterns
    alias: `decode` resizes otherwise unless told so.
    """
    planes = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    small = F.interpolate(planes, (height, width), mode="bilinear", align_corners=False, antialias=False)
    return small.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
