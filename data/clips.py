"""Training clips and evaluation windows: the typed records that models see, and the loader that fills them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Clip:
    """A batch of training windows on the model's grid (h, w). Fields that a predictor does not name in
    ``Predictor.needs`` are not loaded and raise on access through `require`.

    - ``frames`` in [0, 1], RGB.
    - ``latents`` normalised per channel (mean 0, standard deviation 1 over the training split).
    - ``flow_bwd[:, k]`` lives on frame k+1 and points to frame k, in pixels of (h, w): the teacher's.
    - ``visible[:, k]`` in [0, 1] on the grid of frame k+1: 1 where warping frame k can be trusted.
    """

    video: Int[Tensor, " b"]
    start: Int[Tensor, " b"]
    frames: Float[Tensor, "b t 3 h w"] | None = None
    latents: Float[Tensor, "b t z hz wz"] | None = None
    flow_bwd: Float[Tensor, "b t-1 2 h w"] | None = None
    visible: Float[Tensor, "b t-1 1 h w"] | None = None

    def require(self, name: str) -> Tensor:
        """The field, or an error naming it: absent data never drops a loss term silently."""
        value = getattr(self, name)
        if value is None:
            raise ValueError(f"this clip was loaded without {name!r}; name it in the predictor's `needs`")
        return value

    def to(self, device: torch.device | str) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return type(self)(**{k: v.to(device, non_blocking=True) if v is not None else None for k, v in moved.items()})


@dataclass(frozen=True)
class Context:
    """What a rollout may see: observed frames in [0, 1], and the teacher's flow and visibility *between* them."""

    frames: Float[Tensor, "b x 3 h w"]
    flow_bwd: Float[Tensor, "b x-1 2 h w"]
    visible: Float[Tensor, "b x-1 1 h w"]
