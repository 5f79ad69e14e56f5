"""Moving content without a flow field: every cell of the next latent is mixed from the cells around it.

The filter of each cell is made by the network for that cell (dynamic local filters, Jia et al. 2016, arXiv
1605.09673). A filter of one tap is a displacement, two neighbouring taps a fraction of one, and taps on both object
and background an edge that is unsure; nothing says that the taps of an object agree, as a flow would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from models.blocks import ResidualBlock, zero_conv


def offsets(kernel: int) -> list[tuple[int, int]]:
    """(dy, dx) of every cell of a ``kernel`` x ``kernel`` neighbourhood but its centre, row by row."""
    r = kernel // 2
    return [(dy, dx) for dy in range(-r, r + 1) for dx in range(-r, r + 1) if (dy, dx) != (0, 0)]


def mix_neighbours(
    source: Float[Tensor, "b c h w"], weights: Float[Tensor, "b k h w"], kernel: int
) -> Float[Tensor, "b c h w"]:
    """``out(x) = source(x) + sum_i weights_i(x) (source(x + offset_i) - source(x))``, offsets as in `offsets`.

    Outside the source its nearest border cell counts. Weights of zero give the source, bit for bit; computed in
    float32. Raises ValueError if there is not one weight for every offset.
    """
    if weights.shape[1] != kernel**2 - 1:
        raise ValueError(f"{weights.shape[1]} weights per cell; a kernel of {kernel} takes {kernel**2 - 1}")
    r = kernel // 2
    padded = F.pad(source.float(), (r, r, r, r), mode="replicate")
    return _MixNeighbours.apply(padded, weights.float(), kernel)


class _MixNeighbours(torch.autograd.Function):
    """Shifted sums. Autograd's own would keep a product per offset: kernel^2 copies of the latent for every step."""

    @staticmethod
    def forward(
        ctx: Any, padded: Float[Tensor, "b c hp wp"], weights: Float[Tensor, "b k h w"], kernel: int
    ) -> Float[Tensor, "b c h w"]:
        ctx.save_for_backward(padded, weights)
        ctx.kernel = kernel
        out = _shifted(padded, 0, 0, kernel) * (1 - weights.sum(1, keepdim=True))
        for weight, (dy, dx) in zip(weights.split(1, 1), offsets(kernel), strict=True):
            out.addcmul_(weight, _shifted(padded, dy, dx, kernel))
        return out

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch's own takes any number of gradients
        ctx: Any, grad: Float[Tensor, "b c h w"]
    ) -> tuple[Float[Tensor, "b c hp wp"], Float[Tensor, "b k h w"], None]:
        (padded, weights), kernel = ctx.saved_tensors, ctx.kernel
        to_padded, to_weights = torch.zeros_like(padded), torch.empty_like(weights)
        centre = (grad * _shifted(padded, 0, 0, kernel)).sum(1)
        _shifted(to_padded, 0, 0, kernel).addcmul_(grad, 1 - weights.sum(1, keepdim=True))
        for i, (dy, dx) in enumerate(offsets(kernel)):
            to_weights[:, i] = (grad * _shifted(padded, dy, dx, kernel)).sum(1) - centre
            _shifted(to_padded, dy, dx, kernel).addcmul_(grad, weights[:, i : i + 1])
        return to_padded, to_weights, None


def _shifted(padded: Float[Tensor, "b c hp wp"], dy: int, dx: int, kernel: int) -> Float[Tensor, "b c h w"]:
    """A view of the padded source: cell x of it is the source's cell x + (dy, dx)."""
    r = kernel // 2
    h, w = padded.shape[-2] - 2 * r, padded.shape[-1] - 2 * r
    return padded[:, :, r + dy : r + dy + h, r + dx : r + dx + w]


class NextLatentHead(nn.Module):
    """The next latent from features: ``present + gate (moved - present + change)``.

    ``moved`` mixes the neighbours of each cell (`mix_neighbours`; with ``kernel=0`` it is the present itself),
    ``change`` is what moving cannot give, and the gate, in [0, 1], keeps cells in which nothing happens as they are:
    over many steps the least drift of the background costs more than the objects gain. Starts at the present latent
    exactly.
    """

    def __init__(self, features: int, latent_channels: int, *, kernel: int) -> None:
        super().__init__()
        if kernel and kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; it must be odd, or 0 for none")
        self.kernel = kernel
        self.refine = ResidualBlock(features, dilation=2)
        self.filters = zero_conv(features, kernel**2 - 1, 1) if kernel > 1 else None
        self.change = zero_conv(features, latent_channels)
        self.gate = zero_conv(features, 1)

    def forward(
        self, features: Float[Tensor, "b c hz wz"], present: Float[Tensor, "b z hz wz"]
    ) -> Float[Tensor, "b z hz wz"]:
        features = F.silu(self.refine(features))
        change = self.change(features).float()
        if self.filters is not None:
            weights = self.filters(features).float()
            # Larger filters would amplify, and a rollout applies them again and again.
            weights = weights / weights.abs().sum(1, keepdim=True).clamp_min(1)
            change = change + mix_neighbours(present, weights, self.kernel) - present
        return present + torch.sigmoid(self.gate(features).float()) * change
