"""Attention over space and over time, factorised, with a memory of past frames (TimeSformer's divided attention,
Bertasius et al. 2021, arXiv 2102.05095, made causal).

Tokens of one frame look at each other; then every place looks at itself in the frames before. Keys and values of
past frames are kept, so a rollout computes each frame once. Relative time enters by rotation (RoFormer, Su et al. 2021,
arXiv 2104.09864), and no frame further back than ``window`` is seen: a long rollout stays within what training showed.
Residual branches end in zeros, as in `models.blocks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

# The longest wavelength of the rotation is 2 pi times this, in frames.
LONGEST = 100.0


@dataclass(frozen=True)
class Past:
    """Rotated keys and values of the last frames of ``m`` sequences; ``frames`` came before the next one in all."""

    keys: Float[Tensor, "m heads l c"]
    values: Float[Tensor, "m heads l c"]
    frames: int


def zero_linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear map that starts at zero, so that whatever it is added to is unchanged."""
    linear = nn.Linear(inputs, outputs)
    nn.init.zeros_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


def rotate(x: Float[Tensor, "m heads t c"], positions: Int[Tensor, " t"]) -> Float[Tensor, "m heads t c"]:
    """Pairs of channels (i, i + c/2) turned by ``position / LONGEST^(2 i / c)``: inner products of rotated vectors
    depend on the distance of their positions alone. Computed in float32."""
    half = x.shape[-1] // 2
    rates = LONGEST ** (-torch.arange(half, device=x.device) / half)
    angles = positions[:, None] * rates
    cos, sin = angles.cos(), angles.sin()
    a, b = x.float().split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def causal_window(queries: Int[Tensor, " t"], keys: Int[Tensor, " l"], window: int) -> Bool[Tensor, "t l"]:
    """Which key each query may see, by their positions: itself and the ``window - 1`` before it."""
    distance = queries[:, None] - keys[None, :]
    return (distance >= 0) & (distance < window)


class SpatialAttention(nn.Module):
    """Every token of a frame looks at every other; 0 at the start."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(width, 3 * width)
        self.leave = zero_linear(width, width)

    def forward(self, x: Float[Tensor, "m n c"]) -> Float[Tensor, "m n c"]:
        queries, keys, values = rearrange(self.enter(x), "m n (k h c) -> k m h n c", k=3, h=self.heads)
        seen = F.scaled_dot_product_attention(queries, keys, values)
        return self.leave(rearrange(seen, "m h n c -> m n (h c)"))


class CausalAttention(nn.Module):
    """Every token looks at itself and at up to ``window - 1`` tokens before it; 0 at the start.

    ``x`` are new frames that follow those of ``past``; the result is that of all of them at once.
    """

    def __init__(self, width: int, heads: int, *, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.enter = nn.Linear(width, 3 * width)
        self.leave = zero_linear(width, width)

    def forward(self, x: Float[Tensor, "m t c"], past: Past | None) -> tuple[Float[Tensor, "m t c"], Past]:
        first = past.frames if past is not None else 0
        end = first + x.shape[1]
        positions = torch.arange(first, end, device=x.device)
        queries, keys, values = rearrange(self.enter(x), "m t (k h c) -> k m h t c", k=3, h=self.heads)
        queries, keys = rotate(queries, positions), rotate(keys, positions)
        if past is not None:
            keys, values = torch.cat([past.keys, keys], dim=2), torch.cat([past.values, values], dim=2)
        known = torch.arange(end - keys.shape[2], end, device=x.device)
        allowed = causal_window(positions, known, self.window)
        seen = F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
        kept = max(keys.shape[2] - (self.window - 1), 0)
        out = self.leave(rearrange(seen, "m h t c -> m t (h c)"))
        return out, Past(keys[:, :, kept:], values[:, :, kept:], end)


class SpaceTimeBlock(nn.Module):
    """Spatial attention, causal temporal attention and a two-layer network, each on normalised tokens and added."""

    def __init__(self, width: int, heads: int, *, window: int) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"width {width} must be divisible by twice the {heads} heads")
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.space = SpatialAttention(width, heads)
        self.time = CausalAttention(width, heads, window=window)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), zero_linear(4 * width, width))

    def forward(self, tokens: Float[Tensor, "b t n c"], past: Past | None) -> tuple[Float[Tensor, "b t n c"], Past]:
        b, t = tokens.shape[:2]
        tokens = tokens + self.space(self.norms[0](tokens).flatten(0, 1)).unflatten(0, (b, t))
        by_place = rearrange(self.norms[1](tokens), "b t n c -> (b n) t c")
        seen, kept = self.time(by_place, past)
        tokens = tokens + rearrange(seen, "(b n) t c -> b t n c", b=b)
        return tokens + self.mlp(self.norms[2](tokens)), kept
