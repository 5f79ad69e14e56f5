"""Convolutional building blocks that start as the identity, shared by the frame VAE and the predictors.

None of them normalises its activations: every branch ends in a convolution of zeros, so a deep stack starts as the
identity and stays well scaled (Fixup, Zhang et al. 2019, arXiv 1901.09321), and bfloat16 on a CPU keeps its speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def zero_conv(inputs: int, outputs: int, kernel: int = 3) -> nn.Conv2d:
    """A convolution that keeps the grid and starts at zero, so that whatever it is added to is unchanged."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.zeros_(conv.weight)
    nn.init.zeros_(conv.bias)  # pyright: ignore[reportArgumentType]  # a bias is there by default
    return conv


class ResidualBlock(nn.Module):
    """``x + conv(silu(conv(silu(x))))`` with a dilated first convolution; the identity at the start."""

    def __init__(self, width: int, *, dilation: int = 1) -> None:
        super().__init__()
        self.spread = nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation)
        self.merge = zero_conv(width, width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return x + self.merge(F.silu(self.spread(F.silu(x))))


class Trunk(nn.Module):
    """Features of a latent grid: most of the work on a grid coarser by ``coarsen``, details over a skip.

    Dilations cycle through the blocks, so eight blocks at ``coarsen=2`` see the whole of a 32x48 grid: what a moving
    object will hit is far away from it. Height and width must be divisible by ``coarsen``.
    """

    def __init__(
        self, inputs: int, width: int, outputs: int, *, blocks: int, coarsen: int, dilations: Sequence[int] = (1, 2, 4)
    ) -> None:
        super().__init__()
        spread = [dilations[i % len(dilations)] for i in range(blocks)]
        self.coarsen = coarsen
        self.skip = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.enter = nn.Conv2d(inputs * coarsen**2, width, 3, padding=1)
        self.blocks = nn.Sequential(*(ResidualBlock(width, dilation=dilation) for dilation in spread))
        self.leave = nn.Conv2d(width, outputs * coarsen**2, 1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c2 h w"]:
        deep = self.blocks(self.enter(F.pixel_unshuffle(x, self.coarsen)))
        return F.silu(self.skip(x) + F.pixel_shuffle(self.leave(F.silu(deep)), self.coarsen))


def coordinates(like: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 2 h w"]:
    """Where every cell is, x then y, each in [-1, 1]: the camera is fixed, so place means perspective and light."""
    b, _, h, w = like.shape
    ys = torch.linspace(-1, 1, h, device=like.device, dtype=like.dtype)
    xs = torch.linspace(-1, 1, w, device=like.device, dtype=like.dtype)
    return torch.stack([xs[None, :].expand(h, w), ys[:, None].expand(h, w)])[None].expand(b, -1, -1, -1)


def motion_stack(latents: Sequence[Float[Tensor, "b z hz wz"]], past: int) -> Float[Tensor, "b c hz wz"]:
    """What a network needs to see motion: the last latent, the ``past - 1`` changes before it, the latest first, and
    `coordinates`: ``c = past z + 2`` channels. Before the first latent nothing changed."""
    recent = [latents[max(len(latents) - 1 - k, 0)] for k in range(past)]
    changes = [new - old for new, old in pairwise(recent)]
    return torch.cat([recent[0], *changes, coordinates(recent[0])], dim=1)


class Matching(nn.Module):
    """Where each cell of the present latent stood in the previous one, by soft-argmin over a local cost volume.

    Gives three channels on the latent grid: dx, dy (a backward flow of the observed pair, in cells of that grid) and
    the share of the best match. Costs are compared on cells twice as large, averaged over 3x3 of them; ``gain``
    (`LatentVAE.latent_gain`) turns latents into what shows. Only the temperature is learned: matching has no notion
    of what objects look like, so it cannot learn its few training videos by heart.
    """

    def __init__(self, radius: int) -> None:
        super().__init__()
        self.radius = radius
        self.log_doubt = nn.Parameter(torch.tensor(-8.5))

    def forward(
        self, present: Float[Tensor, "b z hz wz"], previous: Float[Tensor, "b z hz wz"], gain: Float[Tensor, " z"]
    ) -> Float[Tensor, "b 3 hz wz"]:
        r, shown = self.radius, gain[:, None, None]
        with torch.no_grad():
            a, b = (F.avg_pool2d(latent.float() * shown, 2) for latent in (present, previous))
            h, w = a.shape[-2:]
            padded = F.pad(b, (r, r, r, r), mode="replicate")
            shifts = [(dx, dy) for dy in range(-r, r + 1) for dx in range(-r, r + 1)]
            near = [padded[:, :, r + dy : r + dy + h, r + dx : r + dx + w] for dx, dy in shifts]
            costs = torch.stack([(a - moved).square().sum(1) for moved in near], dim=1)
            costs = F.avg_pool2d(costs, 3, stride=1, padding=1, count_include_pad=False)
            steps = torch.tensor(shifts, device=a.device, dtype=a.dtype)
            # Where everything looks alike, standing still is the likeliest.
            bias = 2 * steps.norm(dim=1)[:, None, None]
        share = torch.softmax(-costs / self.log_doubt.exp() - bias, dim=1)
        flow_bwd = 2 * torch.einsum("bkhw,kc->bchw", share, steps)
        found = torch.cat([flow_bwd, share.amax(1, keepdim=True)], dim=1)
        return F.interpolate(found, present.shape[-2:], mode="bilinear", align_corners=False)


class ConvLSTMCell(nn.Module):
    """An LSTM whose state is a grid and whose weights are 3x3 convolutions (Shi et al. 2015, arXiv 1506.04214).

    Without the paper's peepholes, which are weights per place and would tie the cell to one size. What comes in is
    added to what goes out, at the start unchanged (He et al. 2016): what one frame shows need not be learnt through
    the gates. The forget gate starts open (bias 1, Jozefowicz et al. 2015). The memory is kept in float32: it adds up
    over the whole clip.
    """

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.gates = nn.Conv2d(inputs + hidden, 4 * hidden, 3, padding=1)
        self.skip = nn.Conv2d(inputs, hidden, 1, bias=False)
        nn.init.dirac_(self.skip.weight)
        with torch.no_grad():
            self.gates.bias[hidden : 2 * hidden] = 1.0  # pyright: ignore[reportOptionalSubscript]  # it has a bias

    def forward(
        self, x: Float[Tensor, "b c h w"], hidden: Float[Tensor, "b d h w"], memory: Float[Tensor, "b d h w"]
    ) -> tuple[Float[Tensor, "b d h w"], Float[Tensor, "b d h w"]]:
        """The next hidden state and memory."""
        gates = self.gates(torch.cat([x.to(hidden.dtype), hidden], dim=1))
        enter, forget, leave, new = gates.float().chunk(4, dim=1)
        memory = forget.sigmoid() * memory + enter.sigmoid() * new.tanh()
        return leave.sigmoid() * memory.tanh() + self.skip(x).float(), memory
