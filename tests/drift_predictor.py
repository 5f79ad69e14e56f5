"""A predictor for tests of training as a whole: small, on frames alone, its loss a plain mean over the batch.

The tests of stages copy this file into their checkout's ``models/predictors``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from data.clips import Clip, Context
from models.predictor import Predictor, Rollout


class Options(BaseModel):
    """Of the network, and how noisy its training is."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    noise: float = Field(default=0.1, ge=0, description="of the input in training, from PyTorch's own generator")


class Drift(Predictor):
    """The next frame is a convolution of the last; a buffer counts the frames it has learned from."""

    needs = frozenset({"frames"})

    def __init__(self, options: Options, *, vaes: object, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        self.options = options
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
        self.seen: Tensor
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        frames = batch.require("frames")
        now, then = frames[:, self.context - 1 : -1].flatten(0, 1), frames[:, self.context :].flatten(0, 1)
        self.seen += len(now)
        noisy = now + self.options.noise * torch.randn(now.shape) if self.options.noise else now
        error = (now + self.net(noisy) - then).square().mean()
        return error, {"error": error.detach()}

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        frames = [context.frames[:, -1]]
        for _ in range(horizon):
            frames.append((frames[-1] + self.net(frames[-1])).clamp(0, 1))
        return Rollout(torch.stack(frames[1:], 1))
