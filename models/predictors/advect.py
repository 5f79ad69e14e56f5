"""Row 1 of every comparison: constant velocity. The last observed flow is carried along itself; nothing is learned."""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from data.clips import Clip, Context
from models.autoencoder import Vaes
from models.predictor import Predictor, Rollout
from models.warp import advect_flow, backward_warp


class Options(BaseModel):
    """There is nothing to choose."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Advect(Predictor):
    """Warps the pixels of the last frame with the teacher's last observed flow, again and again."""

    def __init__(self, options: Options, *, vaes: Vaes, height: int, width: int, context: int) -> None:
        super().__init__(height=height, width=width, context=context)
        if context < 2:
            raise ValueError(f"advect needs the flow between two observed frames; context is {context}")

    def forward(self, batch: Clip) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Raises TypeError: there is nothing to train."""
        raise TypeError("advect is a baseline without weights; evaluate it without training")

    def rollout(self, context: Context, horizon: int, generator: torch.Generator) -> Rollout:
        """Frames and the flow that made them; it has no idea of visibility."""
        frame, flow_bwd = context.frames[:, -1], context.flow_bwd[:, -1]
        frames, flows = [], []
        for _ in range(horizon):
            flow_bwd = advect_flow(flow_bwd)
            frame = backward_warp(frame, flow_bwd)
            frames.append(frame)
            flows.append(flow_bwd)
        return Rollout(frames=torch.stack(frames, 1), flow_bwd=torch.stack(flows, 1))
