"""RAFT's correlation volumes of pairs of encoded frames, and the look-up of a window around where the flow points.

Teed and Deng 2020, section 3.2: the inner products of all cells of one frame with all of the other, and average pools
of it over the other frame (levels). `ExactVolumes` rounds as torchvision's `CorrBlock` does, bit by bit on the CPU;
`FastVolumes` works in bfloat16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torchvision.models.optical_flow.raft import CorrBlock


def products(here: Float[Tensor, "1 c hz wz"], there: Float[Tensor, "1 c hz wz"]) -> Float[Tensor, "cells cells_there"]:
    """Scaled inner products of all cells of ``here`` with all of ``there``, rounded as torchvision does."""
    volume = torch.matmul(here.flatten(2).transpose(1, 2), there.flatten(2))[0]
    return volume.div_(torch.sqrt(torch.tensor(here.shape[1], device=here.device)))


class ExactVolumes:
    """The pyramid of one product (or of its transpose, for the other direction), and torchvision's look-up.

    Sampling stays with `grid_sample`, whose rounding differs from tap to tap; its coordinates are computed in place in
    a buffer that all levels share, by the same operations in the same order.
    """

    def __init__(self, volume: Float[Tensor, "cells cells_there"], height: int, width: int, corr: CorrBlock) -> None:
        level = volume.reshape(-1, 1, height, width)
        self.pyramid = [level]
        for _ in range(corr.num_levels - 1):
            level = F.avg_pool2d(level, kernel_size=2, stride=2)
            self.pyramid.append(level)
        device = volume.device
        steps = torch.linspace(-corr.radius, corr.radius, 2 * corr.radius + 1, device=device)
        self.window = torch.stack(torch.meshgrid(steps, steps, indexing="ij"), dim=-1).reshape(1, -1)  # x and y in turn
        self.xy = torch.arange(2, device=device).repeat(len(steps) ** 2)
        self.grid = torch.empty(len(self.pyramid[0]), len(steps), len(steps), 2, device=device)
        # At full size: dividing by two numbers in turn is ten times slower than by as many as there are.
        last = ([v.shape[3] - 1, v.shape[2] - 1] for v in self.pyramid)
        self.last = [torch.tensor(xy, device=device).float().expand_as(self.grid).contiguous() for xy in last]

    def look_up(self, target: Float[Tensor, "b 2 hz wz"]) -> Float[Tensor, "b taps hz wz"]:
        """(2r+1)^2 bilinear samples per level around each cell's target."""
        b, _, h, w = target.shape
        centre = target.permute(0, 2, 3, 1).reshape(b * h * w, 2)
        samples = []
        for level, last in zip(self.pyramid, self.last, strict=True):
            torch.add(centre.index_select(1, self.xy), self.window, out=self.grid.view(len(centre), -1))
            self.grid.mul_(2).div_(last).sub_(1)
            samples.append(F.grid_sample(level, self.grid, align_corners=True).view(b, h, w, -1))
            centre = centre / 2
        return torch.cat(samples, dim=-1).permute(0, 3, 1, 2).contiguous()


class FastVolumes:
    """The pyramids of both directions of some pairs as one matrix per item, forward pairs first.

    A row for each cell, a column for each cell of each level, one of zeros: pooling is linear, so one product with the
    features and their pooled copies is the whole pyramid. A window of neighbours is gathered once at whole cells and
    blended with the one fraction that all its taps share.
    """

    def __init__(self, features: Float[Tensor, "k c hz wz"], corr: CorrBlock) -> None:
        k, c, h, w = features.shape
        levels = [features]
        for _ in range(corr.num_levels - 1):
            levels.append(F.avg_pool2d(levels[-1], kernel_size=2, stride=2))
        outside = features.new_zeros(k, c, 1)
        targets = torch.cat([level.flatten(2) for level in levels] + [outside], dim=2)
        sources = (features / c**0.5).flatten(2).transpose(1, 2)
        columns = targets.shape[2]
        rows = torch.empty(2, k - 1, h * w, columns, dtype=features.dtype, device=features.device)
        torch.matmul(sources[:-1], targets[1:], out=rows[0])
        torch.matmul(sources[1:], targets[:-1], out=rows[1])
        self.rows = rows.view(-1, columns)

        device = features.device
        heights = torch.tensor([level.shape[2] for level in levels], device=device)
        widths = torch.tensor([level.shape[3] for level in levels], device=device)
        sizes = heights * widths
        self.heights, self.widths, self.starts = (x[:, None] for x in (heights, widths, sizes.cumsum(0) - sizes))
        self.outside = columns - 1
        self.scales = torch.tensor([[0.5**i] for i in range(len(levels))], device=device)
        self.taps = torch.arange(-corr.radius, corr.radius + 2, device=device)

    def look_up(self, target: Float[Tensor, "b 2 hz wz"]) -> Float[Tensor, "b taps hz wz"]:
        """(2r+1)^2 bilinear samples per level out of (2r+2)^2 whole cells; zero outside, x before y, as torchvision."""
        b, _, h, w = target.shape
        centre = target.permute(0, 2, 3, 1).reshape(-1, 1, 2) * self.scales  # (cells, levels, 2)
        corner = centre.floor()
        fraction = (centre - corner)[..., None, None]
        corner = corner.long()
        x = corner[..., 0, None] + self.taps  # (cells, levels, 2r+2)
        y = corner[..., 1, None] + self.taps
        x = torch.where((x >= 0) & (x < self.widths), x, self.outside)
        y = torch.where((y >= 0) & (y < self.heights), y * self.widths + self.starts, self.outside)
        column = (x[..., :, None] + y[..., None, :]).clamp_(max=self.outside)
        window = self.rows.gather(1, column.flatten(1)).view(column.shape).float()
        window = torch.lerp(window[..., :-1, :], window[..., 1:, :], fraction[:, :, 0])
        window = torch.lerp(window[..., :-1], window[..., 1:], fraction[:, :, 1])
        return window.reshape(b, h, w, -1).permute(0, 3, 1, 2)


Volumes = ExactVolumes | FastVolumes
