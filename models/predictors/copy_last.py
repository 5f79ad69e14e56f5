"""Row 0 of every comparison: nothing moves."""

from __future__ import annotations

import torch
from einops import repeat
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from data.clips import Clip, Context
from models.autoencoder import Vaes
from models.predictor import Predictor, Rollout


class Options(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CopyLast(Predictor):
    """Repeats the last observed frame."""

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Raises TypeError: there is nothing to train."""
        raise TypeError("copy_last is a baseline without weights; evaluate it without training")

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """The last frame ``horizon`` times."""
        return Rollout(frames=repeat(context.frames[:, -1], "b c h w -> b y c h w", y=horizon))
