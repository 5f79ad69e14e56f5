"""From a recurrent state on a coarse grid back to pixels: fine features, and the residual.

Everything that works on fine grids folds its pixels into channels first (pixel unshuffle): the same information, and a
convolution of many channels on few cells is several times faster on a CPU than one of few channels on many.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.blocks import ResidualBlock, zero_conv
from models.warp import resize_flow

FINE = 2
"""Pixels per cell of the fine grid; the middle one has twice as many, the state's four times."""


class FineFeatures(nn.Module):
    """Features at 4 and at 2 pixels per cell: the state at 8, and over skips the present frame and its flow, whose
    edges are sharp."""

    def __init__(self, hidden: int, middle: int, fine: int) -> None:
        super().__init__()
        self.to_middle = nn.Conv2d(hidden, 4 * middle, 1)
        self.skip_middle = nn.Conv2d(3 * 16 + 4, middle, 3, padding=1)
        self.mix = ResidualBlock(middle)
        self.to_fine = nn.Conv2d(middle, 4 * fine, 1)
        self.skip_fine = nn.Conv2d(3 * 4 + 4, fine, 3, padding=1)

    def forward(
        self,
        hidden: Float[Tensor, "b c gh gw"],
        frame: Float[Tensor, "b 3 h w"],
        before_bwd: Float[Tensor, "b 2 h w"],
        prior_bwd: Float[Tensor, "b 2 h w"],
    ) -> tuple[Float[Tensor, "b m hm wm"], Float[Tensor, "b f hf wf"]]:
        """Middle and fine features, activated. ``before_bwd`` ended in ``frame``, ``prior_bwd`` would come next; both
        in pixels, on the frame's grid."""
        h, w = frame.shape[-2:]
        both = torch.cat([before_bwd, prior_bwd], dim=1)
        seen = [
            torch.cat([F.pixel_unshuffle(frame - 0.5, cell), _shrink(both, h // cell, w // cell)], dim=1)
            for cell in (2 * FINE, FINE)
        ]
        middle = F.pixel_shuffle(self.to_middle(hidden), 2) + self.skip_middle(seen[0])
        middle = F.silu(self.mix(middle))
        fine = F.silu(F.pixel_shuffle(self.to_fine(middle), 2) + self.skip_fine(seen[1]))
        return middle, fine


class FillHead(nn.Module):
    """The residual: ``gate * (fill - warped) + detail``, zero at the start.

    What warping cannot give is above all ground that comes into view. It is filled from the median of the observed
    frames, corrected on the middle grid where an object rests in it: ``fill`` is smooth where nothing was seen, the
    gate is as sharp as a pixel, and so what was observed comes back as it was. ``detail`` is the rest.
    """

    def __init__(self, middle: int, fine: int, width: int) -> None:
        super().__init__()
        self.correct = zero_conv(middle, 3)
        self.enter = nn.Conv2d(fine + 6 * FINE**2 + 4, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.out = zero_conv(width, 4 * FINE**2)

    def forward(
        self,
        middle: Float[Tensor, "b m hm wm"],
        fine: Float[Tensor, "b f hf wf"],
        warped: Float[Tensor, "b 3 h w"],
        background: Float[Tensor, "b 3 h w"],
        before_bwd: Float[Tensor, "b 2 h w"],
        after_bwd: Float[Tensor, "b 2 h w"],
    ) -> Float[Tensor, "b 3 h w"]:
        """``before_bwd`` and ``after_bwd`` in pixels: a place that moved and now rests has just been uncovered."""
        correction = self.correct(middle).float()
        fill = background + F.interpolate(correction, warped.shape[-2:], mode="bilinear", align_corners=False)
        flows = _shrink(torch.cat([before_bwd, after_bwd], dim=1), *fine.shape[-2:])
        pixels = F.pixel_unshuffle(torch.cat([warped - 0.5, fill - warped], dim=1), FINE)
        features = torch.cat([fine, pixels.to(fine.dtype), flows.to(fine.dtype)], dim=1)
        features = F.silu(self.middle(F.silu(self.enter(features))))
        out = F.pixel_shuffle(self.out(features).float(), FINE)
        return out[:, :1] * (fill - warped) + out[:, 1:]


def _shrink(flows: Float[Tensor, "b 4 h w"], height: int, width: int) -> Float[Tensor, "b 4 h2 w2"]:
    """Two flows averaged down, in units of the new grid."""
    return torch.cat([resize_flow(flow, height, width) for flow in flows.split(2, dim=1)], dim=1)
