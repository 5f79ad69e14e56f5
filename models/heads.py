"""Flow, occlusion and residual heads. Each starts at the identity: no correction, all visible, nothing added."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.blocks import zero_conv

# sigmoid(6) = 0.9975: twelve masks in a row still keep 97 % of a latent, and the gradient is not lost.
VISIBLE_AT_START = 6.0
# From so far up, a convolution of zeros needs hundreds of steps to say 'hidden'; its output is scaled to need tens.
LOGIT_SCALE = 10.0


class FlowHead(nn.Module):
    """Corrects a backward flow: ``flow = prior * (1 + tanh(gain)) + shift``, both read from features.

    The gain slows down or stops what moves without blurring the sharp edges of the prior, which may live on a finer
    grid than the features; the shift sets things in motion. ``cell`` is the size of a feature cell in the units of
    the prior. Starts at ``flow = prior``.
    """

    def __init__(self, inputs: int, *, cell: float) -> None:
        super().__init__()
        self.cell = cell
        self.out = zero_conv(inputs, 3)

    def forward(
        self, features: Float[Tensor, "b c hz wz"], prior: Float[Tensor, "b 2 h w"]
    ) -> Float[Tensor, "b 2 h w"]:
        out = self.out(features).float()
        if out.shape[-2:] != prior.shape[-2:]:
            out = F.interpolate(out, prior.shape[-2:], mode="bilinear", align_corners=False)
        return prior * (1 + out[:, :1].tanh()) + out[:, 1:] * self.cell


class OcclusionHead(nn.Module):
    """Logits of visibility: positive where the warped latent can be trusted. Starts at 0.9975 everywhere.

    Besides features it sees the flow before and after the step, in cells: a place that moved and now stands still
    has just been uncovered, which is all there is to most occlusions.
    """

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(inputs + 4, width, 3, padding=1)
        self.out = zero_conv(width, 1)

    def forward(
        self,
        features: Float[Tensor, "b c hz wz"],
        before_bwd: Float[Tensor, "b 2 hz wz"],
        after_bwd: Float[Tensor, "b 2 hz wz"],
    ) -> Float[Tensor, "b 1 hz wz"]:
        flows = torch.cat([before_bwd, after_bwd], dim=1).to(features.dtype)
        hidden = F.silu(self.enter(torch.cat([features, flows], dim=1)))
        return LOGIT_SCALE * self.out(hidden).float() + VISIBLE_AT_START


class ResidualHead(nn.Module):
    """What warping cannot give: uncovered background, light, sharpness. Sees the whole warped latent. Starts at 0."""

    def __init__(self, features: int, latent_channels: int, width: int) -> None:
        super().__init__()
        self.enter = nn.Conv2d(features + latent_channels, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.out = zero_conv(width, latent_channels)

    def forward(
        self, features: Float[Tensor, "b c hz wz"], warped: Float[Tensor, "b z hz wz"]
    ) -> Float[Tensor, "b z hz wz"]:
        hidden = F.silu(self.enter(torch.cat([features, warped.to(features.dtype)], dim=1)))
        return self.out(F.silu(self.middle(hidden))).float()
